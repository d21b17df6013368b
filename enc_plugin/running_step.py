"""Steps of optimizers that run: one step may hold another, of an optimizer that wraps it or by ``super().step()``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.optim.optimizer import Optimizer


class RunningStep:
    """A running call of ``step``, with the groups that something is done to in it.

    Args:
        frame: Of the hook's caller, which runs the step; None where frames are not known (``torch.compile``).
        groups: Parameter groups.
    """

    def __init__(self, frame: FrameType | None, groups: list[dict[str, Any]]):
        self._frame = None if frame is None else (id(frame), frame.f_code)
        self.groups = groups

    def shares(self, groups: list[dict[str, Any]]) -> bool:
        """Whether a parameter is in both."""
        own = {id(p) for group in self.groups for p in group["params"]}
        return any(id(p) in own for group in groups for p in group["params"])

    def runs(self, frame: FrameType | None) -> bool:
        """Whether the call encloses ``frame``; not so if an exception ended it."""
        if frame is None or self._frame is None:
            return True
        while (frame := frame.f_back) is not None:
            if (id(frame), frame.f_code) == self._frame:
                return True
        return False


def calling_frame() -> FrameType | None:
    """Frame that called the hook that calls this; None under ``torch.compile``, which knows no frames."""
    return None if torch.compiler.is_compiling() else sys._getframe(2)


def steps_itself(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether ``optimizer`` steps a group that it has, and does not leave that to an optimizer which it holds."""
    inner = {id(p) for one in inner_optimizers(optimizer) for held in one.param_groups for p in held["params"]}
    return not any(id(p) in inner for p in group["params"])


def inner_optimizers(optimizer: Optimizer) -> Iterator[Any]:
    """Optimizers that ``optimizer`` holds: alone, in a list or a dict, or one of their methods."""
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups", "defaults") or name.startswith("_optimizer_"):
            continue
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for held in (getattr(value, "__self__", value) for value in values):
            if isinstance(getattr(held, "param_groups", None), list) and held is not optimizer:
                yield held
