"""Measurements within a training run: they see one model on all ranks, and leave it as they found it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from mmengine.dist import broadcast, get_dist_info
from mmengine.model import is_model_wrapper
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn

from ..functional.rng import kept_random_states
from ..surgery.startup_average import unfit_statistics

# Flags of activation checkpointing (mmpretrain's and timm's): where it is reentrant, autograd.grad refuses it.
_CHECKPOINTING = ("with_cp", "grad_checkpointing")
# mmengine's option ``activation_checkpointing`` sets no flag: it wraps the ``forward`` of modules, reentrant too.
_WRAPPER = turn_on_activation_checkpointing.__module__


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Block in which ``model`` is in eval mode and equal on all ranks, and which the run around it does not notice.

    Restored are the mode of every module, the buffers, and the random states of Python, NumPy, torch and the model's
    own generators. Within the block all ranks have rank 0's buffers: batch norm statistics differ between ranks, and
    rank 0's are those that a checkpoint holds. Activation checkpointing and gradients are off. Every rank has to enter
    the block.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [
        (module, flag, getattr(module, flag))
        for module in model.modules()
        for flag in _CHECKPOINTING
        if isinstance(getattr(module, flag, None), bool)
    ]
    forwards = [(module, module.forward) for module in model.modules() if _is_wrapped(module.__dict__.get("forward"))]
    own = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_initialized() else []
    try:
        with kept_random_states(devices, model), torch.no_grad():
            model.eval()
            for module, flag, _ in flags:
                setattr(module, flag, False)
            for module, forward in forwards:
                while _is_wrapped(forward):
                    forward = forward.__wrapped__
                module.forward = forward
            if get_dist_info()[1] > 1:
                for buffer, _ in own:
                    broadcast(buffer, src=0)
            yield
    finally:
        for module, flag, value in flags:
            setattr(module, flag, value)
        for module, forward in forwards:
            module.forward = forward
        with torch.no_grad():
            for buffer, value in own:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a (distributed) model wrapper, or the model itself."""
    while is_model_wrapper(model):
        model = model.module
    return model


def statistics_note(model: nn.Module) -> str:
    """What to say beside a number measured in eval mode while running statistics do not fit the weights; else ''."""
    unfit = unfit_statistics(model)
    if not unfit:
        return ""
    name, why = next(iter(unfit.items()))
    return (
        f"not yet the network that trains: running statistics of {len(unfit)} batch norms do not fit ({name!r}: {why})"
    )


def recomputed(model: nn.Module) -> list[str]:
    """Names of the modules whose forward pass runs twice in training, because activation checkpointing is on."""
    return [
        name
        for name, module in model.named_modules()
        if _is_wrapped(module.__dict__.get("forward")) or any(getattr(module, f, False) is True for f in _CHECKPOINTING)
    ]


def _is_wrapped(forward: Callable | None) -> bool:
    """Whether a module's own ``forward`` is mmengine's wrapper around its class's."""
    # By its globals: functools.wraps gave it the name and the module of what it wraps.
    return hasattr(forward, "__wrapped__") and getattr(forward, "__globals__", {}).get("__name__") == _WRAPPER
