"""What "the same run, bit for bit" means: ends of training and logs, compared without tolerance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS

CLOCK = ("time", "data_time", "memory")  # and whatever ends in "/seconds"


class Stopped(BaseException):
    """Ends a run at the point that a test names; as Ctrl-C, no failure of the run."""


@HOOKS.register_module(force=True)
class StopHook(Hook):
    """Raises :class:`Stopped` before epoch ``epoch``, before the ``val``-th validation, or after iteration ``iter``."""

    priority = "LOWEST"

    def __init__(self, epoch: int | None = None, val: int | None = None, iter: int | None = None):
        self.epoch, self.val, self.iter = epoch, val, iter
        self.vals = 0

    def before_train_epoch(self, runner):
        if runner.epoch == self.epoch:
            raise Stopped

    def before_val(self, runner):
        self.vals += 1
        if self.vals == self.val:
            raise Stopped

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iter:
            raise Stopped


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Nested containers of equal structure, tensors of equal bits."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {sorted(a.keys() ^ b.keys(), key=str)[:5]}"
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{index}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), where
    elif isinstance(a, HistoryBuffer):
        assert_same(a.data, b.data, where)
    else:
        assert a == b, f"{where}: {a!r}, {b!r}"


def end_of(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint that training goes on from, but for clocks and paths."""
    content = torch.load(checkpoint)
    histories = content.pop("message_hub")["log_scalars"]
    content["history"] = {k: v for k, v in histories.items() if not k.endswith(("time", "memory"))}
    meta = content.pop("meta")
    return content | {"epoch": meta["epoch"], "iter": meta["iter"], "seed": meta["seed"]}


def logged(work_dir: Path) -> dict[tuple[str, int, str], float]:
    """Every scalar but clocks and the audit's, by kind, step and name, of all runs in ``work_dir``.

    What several of them log (a validation that is made up for) has to be equal.
    """
    values: dict[tuple[str, int, str], float] = {}
    for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            kind = "train" if "iter" in line else "other"
            for name, value in line.items():
                # The audit logs whenever a run starts, resumed or not; it is a function of the weights.
                if name not in ("step", *CLOCK) and not name.startswith("enc/") and not name.endswith("/seconds"):
                    assert values.setdefault((kind, line["step"], name), value) == value, (path, line, name)
    return values


def assert_same_run(a: Path, b: Path, checkpoint: str) -> None:
    """Runs in the folders ``a`` and ``b`` ended with the same ``checkpoint`` and logged the same."""
    assert_same(end_of(a / checkpoint), end_of(b / checkpoint))
    assert_same(dict(sorted(logged(a).items())), dict(sorted(logged(b).items())))
