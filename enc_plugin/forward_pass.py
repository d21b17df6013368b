"""Forward passes that run in this thread, and the weights that were computed for them before the layers ask.

A weight that was computed in advance is of use while the pass runs that it was computed for, and never after. So it is
kept with the pass, in the thread that runs it, and not in the layer: layers that are called alone, copied, saved or
replicated find none and compute their own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType

import torch
from torch import Tensor, nn

# Weight of a layer within a pass, or None if the layer is to compute it.
WeightOf = Callable[[nn.Module], Tensor | None]


class _Pass:
    def __init__(self, model: nn.Module, frame: FrameType, weight_of: WeightOf):
        self.model, self.frame, self.weight_of, self.mode = model, frame, weight_of, _mode()

    def is_running(self) -> bool:
        # Hooks after a forward pass are not called if KeyboardInterrupt ends it; its frame is gone all the same.
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self.frame:
                return True
            frame = frame.f_back
        return False


class _Running(threading.local):
    def __init__(self) -> None:
        self.passes: list[_Pass] = []


_running = _Running()


def open_pass(model: nn.Module, weight_of: WeightOf) -> None:
    """Let the layers of ``model`` take their weights from ``weight_of`` until the caller's caller returns.

    Args:
        model: The network. To be called by a forward pre-hook of it: what calls the hook runs the forward pass.
        weight_of: See :data:`WeightOf`. It is asked in the mode of autograd and autocast of this moment alone.
    """
    _running.passes.append(_Pass(model, sys._getframe(2), weight_of))


def close_pass(model: nn.Module) -> None:
    """End the innermost pass of ``model``, and all that exceptions have left behind."""
    passes = _running.passes
    while passes and not passes[-1].is_running():
        passes.pop()
    if passes and passes[-1].model is model:
        passes.pop()


def weight_in_pass(layer: nn.Module) -> Tensor | None:
    """The weight of ``layer`` that was computed for the pass that runs, in the mode that holds here; None without one.

    The innermost pass that knows the layer answers.
    """
    if torch.compiler.is_compiling() or not _running.passes:
        return None
    passes = _running.passes
    while passes and not passes[-1].is_running():
        passes.pop()
    mode = _mode() if passes else None
    for running in reversed(passes):
        weight = running.weight_of(layer) if running.mode == mode else None
        if weight is not None:
            return weight
    return None


def _mode() -> tuple:
    """What a weight depends on beside the layer: how autograd records, what it saves, and what autocast casts to."""
    # Activation checkpointing sets hooks for saved tensors, and computes once more what it has not saved: the same
    # operations, so each layer's own.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    casts = [
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    ]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.jit.is_tracing(), hooks, casts
