"""Running forward passes of this thread, with the effective weights that were computed for them in advance.

A precomputed weight is valid only during its forward pass. So it is stored with the pass, in the thread that runs it,
and not in the layer: layers that are called alone, copied, saved or replicated find none and compute their own.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# Before torch 2.8, activation checkpointing cannot be distinguished from a plain forward pass.
_CAN_SEE_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")


class Weights(Protocol):
    """Effective weights of one forward pass."""

    device_type: str  # autocast has a mode for each type

    def weight_of(self, layer: Any) -> Tensor | None:
        """Effective weight of ``layer``, or None if the layer has to compute it."""


class _Pass:
    def __init__(self, model: nn.Module, frame: FrameType, weights: Weights):
        self.model, self.frame, self.weights, self.mode = model, frame, weights, _mode(weights.device_type)

    def is_running(self) -> bool:
        # A KeyboardInterrupt skips the forward hooks, but the frame of the pass is gone.
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
    """Whether weights may be precomputed here: not under torch.compile, tracing or transforms of ``torch.func``."""
    is_transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return _CAN_SEE_HOOKS and not (is_traced or is_transformed)


def open_pass(model: nn.Module, weights: Weights) -> None:
    """Begin a forward pass of ``model``, in which its layers take their weights from ``weights``.

    Call this from a forward pre-hook: the pass ends when the module call that runs the hook returns.

    Args:
        model: The network.
        weights: Used only in the autograd and autocast modes of this moment.
    """
    _running.passes.append(_Pass(model, sys._getframe(2), weights))


def close_pass(model: nn.Module) -> Any:
    """End the innermost pass if it is one of ``model``; also drops passes that raised.

    Returns:
        What :func:`open_pass` was given as ``weights``; None if no pass of ``model`` was running.
    """
    passes = _running_passes()
    return passes.pop().weights if passes and passes[-1].model is model else None


def weight_in_pass(layer: nn.Module) -> Tensor | None:
    """Effective weight of ``layer`` from the innermost running pass that has it, or None if there is none."""
    if torch.compiler.is_compiling():
        return None
    for running in reversed(_running_passes()):
        weight = running.weights.weight_of(layer) if running.mode == _mode(running.weights.device_type) else None
        if weight is not None:
            return weight
    return None


def _running_passes() -> list[_Pass]:
    passes = _running.passes
    while passes and not passes[-1].is_running():
        passes.pop()
    return passes


def _mode(device_type: str) -> tuple:
    """Modes of autograd and autocast that an effective weight depends on."""
    # Activation checkpointing sets hooks for saved tensors. It reruns the layers when the pass is over, so they have to
    # compute their own weights in both runs.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._are_functorch_transforms_active(),
        forward_ad._current_level,
        hooks,
        dtype,
    )
