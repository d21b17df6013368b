"""The context of a measurement in a training run: the same model on all ranks, restored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from mmengine.dist import broadcast, get_dist_info
from mmengine.model import is_model_wrapper
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn

from ..functional.buffers import kept_buffers
from ..functional.rng import kept_random_states
from ..surgery.startup_average import unfit_statistics

# Flags of activation checkpointing in mmpretrain and timm. The reentrant kind does not work with autograd.grad.
_CHECKPOINTING = ("with_cp", "grad_checkpointing")
# mmengine's option ``activation_checkpointing`` sets no flag. It wraps the ``forward`` of modules, reentrant too.
_WRAPPER = turn_on_activation_checkpointing.__module__


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within the context, ``model`` is in eval mode and equal on all ranks. All ranks must enter it.

    On exit the mode of each module, the buffers, and the random states of Python, NumPy, torch and of generators in the
    model are restored. Within the context, all ranks have the buffers of rank 0, because batch norm statistics differ
    between ranks and a checkpoint contains those of rank 0. Activation checkpointing and gradients are off.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [
        (module, flag, getattr(module, flag))
        for module in model.modules()
        for flag in _CHECKPOINTING
        if isinstance(getattr(module, flag, None), bool)
    ]
    forwards = [(module, module.forward) for module in model.modules() if _is_wrapped(module.__dict__.get("forward"))]
    devices = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_initialized() else []
    try:
        with kept_buffers(model), kept_random_states(devices, model), torch.no_grad():
            model.train()  # networks that keep values of their weights in eval mode (LeViT, ...) drop them
            model.eval()
            for module, flag, _ in flags:
                setattr(module, flag, False)
            for module, forward in forwards:
                while _is_wrapped(forward):
                    forward = forward.__wrapped__
                module.forward = forward
            if get_dist_info()[1] > 1:
                for buffer in model.buffers():
                    broadcast(buffer, src=0)
            yield
    finally:
        for module, flag, value in flags:
            setattr(module, flag, value)
        for module, forward in forwards:
            module.forward = forward
        for module, mode in modes:  # parents come first
            module.train(mode)
        for module, mode in modes:  # some networks overrule train() in their frozen parts
            module.training = mode


def check_precision(model: nn.Module) -> None:
    """Raise ``ValueError`` if a weight has a lower precision than float32, in which measurements are computed."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.element_size() < 4:
            raise ValueError(
                f"model: expected weights in float32 or float64, because measurements are computed in float32, got "
                f"{weight.dtype} in {name!r}; measure copy.deepcopy(model).float()"
            )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of a (distributed) model wrapper, or the model itself."""
    while is_model_wrapper(model):
        model = model.module
    return model


def statistics_note(model: nn.Module) -> str:
    """A note for numbers measured in eval mode if running statistics do not fit the weights yet, else ''."""
    unfit = unfit_statistics(model)
    if not unfit:
        return ""
    name, why = next(iter(unfit.items()))
    return (
        f"not yet the network that is trained: the running statistics of {len(unfit)} batch norms do not fit "
        f"({name!r}: {why})"
    )


def recomputed(model: nn.Module) -> list[str]:
    """Names of the modules with activation checkpointing."""
    return [
        name
        for name, module in model.named_modules()
        if _is_wrapped(module.__dict__.get("forward")) or any(getattr(module, f, False) is True for f in _CHECKPOINTING)
    ]


def _is_wrapped(forward: Callable | None) -> bool:
    """Whether ``forward``, an instance attribute, is mmengine's wrapper around the forward of the class."""
    # Checked by its globals, because functools.wraps copied the name and module of the wrapped function.
    return hasattr(forward, "__wrapped__") and getattr(forward, "__globals__", {}).get("__name__") == _WRAPPER
