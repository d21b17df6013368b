"""Running calls of ``Optimizer.step``, which nest: in optimizers that wrap others, and by ``super().step()``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


class RunningStep:
    """A running call of ``step``.

    Args:
        frame: Python frame that called the step hook; None under ``torch.compile``.
        groups: Parameter groups that the hook changes in this step.
    """

    def __init__(self, frame: FrameType | None, groups: list[dict[str, Any]]):
        self._frame = None if frame is None else (id(frame), frame.f_code)
        self.groups = groups

    def shares(self, groups: list[dict[str, Any]]) -> bool:
        """Whether ``groups`` and the groups of this step have a parameter in common."""
        own = {id(p) for group in self.groups for p in group["params"]}
        return any(id(p) in own for group in groups for p in group["params"])

    def runs(self, frame: FrameType | None) -> bool:
        """Whether this call encloses ``frame``. False if an exception has ended the call."""
        if frame is None or self._frame is None:
            return True
        while (frame := frame.f_back) is not None:
            if (id(frame), frame.f_code) == self._frame:
                return True
        return False


def register_first_post_hook(optimizer: Optimizer, hook: Callable[[Optimizer, tuple, dict], None]) -> None:
    """Register a step post-hook before the others, which may average the weights, so that they see its result."""
    hooks: Any = optimizer._optimizer_step_post_hooks  # an OrderedDict
    hooks.move_to_end(optimizer.register_step_post_hook(hook).id, last=False)


def move_pre_hook_last(optimizer: Optimizer, key: int) -> None:
    """Move a step pre-hook behind the others, which may clip or rescale gradients."""
    hooks: Any = optimizer._optimizer_step_pre_hooks  # an OrderedDict
    hooks.move_to_end(key)


Decays = list[tuple[dict[str, Any], float | Tensor]]  # groups, and the decay that they have outside of the step


def replace_decay(group: dict[str, Any], decay: float | Tensor, replaced: Decays) -> None:
    """Let the running step see another ``weight_decay``, and add the group's own to ``replaced``."""
    replaced.append((group, group["weight_decay"]))
    group["weight_decay"] = decay


def restore_decays(replaced: Decays) -> None:
    """Give groups back what :func:`replace_decay` has taken, and empty ``replaced``; also after a step that raised."""
    while replaced:
        group, group["weight_decay"] = replaced.pop()


def start_momentum(optimizer: Optimizer) -> None:
    """Let the momentum of fused SGD start at 0, which is exact, before its first step under a gradient scaler.

    If the scaler skips that step, torch leaves the momentum as uninitialised memory, which later steps use.
    """
    if not isinstance(optimizer, torch.optim.SGD) or getattr(optimizer, "found_inf", None) is None:
        return
    for group in optimizer.param_groups:
        # With dampening, torch takes the first gradient as a whole, and not damped.
        if group.get("fused") and group["momentum"] and not group["dampening"]:
            for p in group["params"]:
                if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def calling_frame() -> FrameType | None:
    """Frame that called the hook that calls this function; None under ``torch.compile``, which has no frames."""
    return None if torch.compiler.is_compiling() else sys._getframe(2)


def steps_itself(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether ``optimizer`` steps ``group`` itself, instead of leaving that to an optimizer that it wraps."""
    if is_zero(optimizer):  # maybe in another process
        return False
    inner = {id(p) for one in inner_optimizers(optimizer) for held in one.param_groups for p in held["params"]}
    return inner.isdisjoint(map(id, group["params"]))


def is_zero(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` shares out its parameters among the processes, as torch's ``ZeroRedundancyOptimizer``."""
    # Importing its module takes a second.
    zero = getattr(sys.modules.get("torch.distributed.optim"), "ZeroRedundancyOptimizer", None)
    return zero is not None and isinstance(optimizer, zero)


def inner_optimizers(optimizer: Optimizer) -> Iterator[Any]:
    """Optimizers among the attributes of ``optimizer``: directly, in a list or dict, or as the owner of a method."""
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups", "defaults") or name.startswith("_optimizer_"):
            continue
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for held in (getattr(value, "__self__", value) for value in values):
            if isinstance(getattr(held, "param_groups", None), list) and held is not optimizer:
                yield held
