"""Check of the strength of weight decay in a run of a config."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mmengine.config import Config

from ..engine.efolds import config_efolds
from ..table import two_digits
from .finding import NOTE, OK, Result

PAPERS = 33  # e-folds of the paper's ImageNet recipe


def examine_decay(cfg: Config, samples: int) -> Iterator[Result]:
    """How strongly weight decay reduces the squared norms of the weights in a run on one process, in e-folds.

    Args:
        cfg: Training config.
        samples: Number of training samples.
    """
    loader, optim_wrapper = cfg.train_dataloader, cfg.get("optim_wrapper") or {}
    steps = math.ceil(samples / loader.get("batch_size", 1))
    efolds = config_efolds(cfg, steps) if "optimizer" in optim_wrapper else None
    if efolds is None:
        return
    efolds /= optim_wrapper.get("accumulative_counts", 1)
    found = f"{two_digits(efolds)} e-folds of the squared norm of W on one process (the paper's recipe: {PAPERS})"
    if not efolds:
        yield OK, "no weight decay"
    elif efolds < 1:
        yield (
            NOTE,
            found,
            "weight decay has little effect: the norms stay near their initial values; for 1 e-fold, use "
            f"weight_decay x {two_digits(1 / efolds)} or more epochs",
        )
    else:
        yield OK, found
