"""Forward passes that run in this thread, and the weights that were computed for them before the layers ask.

A weight that was computed in advance is of use while the pass runs that it was computed for, and never after. So it is
kept with the pass, in the thread that runs it, and not in the layer: layers that are called alone, copied, saved or
replicated find none and compute their own.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# Before torch 2.8, activation checkpointing cannot be told from a plain forward pass.
_CAN_SEE_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")


class Weights(Protocol):
    """Weights of one forward pass."""

    def weight_of(self, layer: nn.Module) -> Tensor | None:
        """The weight of ``layer``, or None if the layer is to compute it."""


class _Pass:
    def __init__(self, model: nn.Module, frame: FrameType, weights: Weights):
        self.model, self.frame, self.weights, self.mode = model, frame, weights, _mode()

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


def can_precompute() -> bool:
    """Whether weights may be computed in advance here: not where operations are recorded, batched or differentiated."""
    return _CAN_SEE_HOOKS and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_transformed())


def open_pass(model: nn.Module, weights: Weights) -> None:
    """Let the layers of ``model`` ask ``weights`` for theirs, until what calls the calling hook returns.

    Args:
        model: The network. To be called by a forward pre-hook of it.
        weights: Asked in the modes of autograd and autocast alone that hold at this moment.
    """
    _running.passes.append(_Pass(model, sys._getframe(2), weights))


def close_pass(model: nn.Module) -> Weights | None:
    """End the innermost pass of ``model``, and those that exceptions have left behind; returns its weights."""
    passes = _running_passes()
    return passes.pop().weights if passes and passes[-1].model is model else None


def weight_in_pass(layer: nn.Module) -> Tensor | None:
    """The weight of ``layer`` in the forward pass that runs, or None if the layer is to compute it.

    The innermost pass answers that has one.
    """
    if torch.compiler.is_compiling() or not _running.passes:
        return None
    mode = _mode()
    weights = (x.weights.weight_of(layer) for x in reversed(_running_passes()) if x.mode == mode)
    return next((weight for weight in weights if weight is not None), None)


def _running_passes() -> list[_Pass]:
    passes = _running.passes
    while passes and not passes[-1].is_running():
        passes.pop()
    return passes


def _mode() -> tuple:
    """What a weight depends on beside the layer: how autograd records, what it saves, and what autocast casts to."""
    # Activation checkpointing sets hooks for saved tensors. What it saves it computes again, by the same operations,
    # when the pass is over: by each layer's own.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    casts = [(x, torch.get_autocast_dtype(x)) for x in ("cpu", "cuda") if torch.is_autocast_enabled(x)]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _is_transformed(), hooks, casts


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
