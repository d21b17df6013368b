"""Whether weight decay acts in a run of a config."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mmengine.config import Config

from ..engine.efolds import config_efolds
from .finding import NOTE, OK, Finding

PAPERS = 33  # e-folds of the paper's ImageNet recipe


def examine_decay(cfg: Config, samples: int) -> Iterator[Finding]:
    """How far weight decay lowers the squared norms of the weights in a run on one process; a note below 1 e-fold.

    Args:
        cfg: Training config.
        samples: Training samples.
    """
    loader, optim_wrapper = cfg.train_dataloader, cfg.get("optim_wrapper") or {}
    steps = math.ceil(samples / loader.get("batch_size", 1))
    efolds = config_efolds(cfg, steps) if "optimizer" in optim_wrapper else None
    if efolds is None:
        return
    efolds /= optim_wrapper.get("accumulative_counts", 1)
    found = f"{efolds:.2g} e-folds of the squared norm of W on one process (the paper's recipe: {PAPERS})"
    if not efolds:
        yield Finding("decay", OK, "no weight decay")
    elif efolds < 1:
        advice = (
            f"weight decay hardly acts: norms stay near where they start. weight_decay x {1 / efolds:.2g}, or more "
            "epochs, reach 1 e-fold"
        )
        yield Finding("decay", NOTE, found, advice)
    else:
        yield Finding("decay", OK, found)
