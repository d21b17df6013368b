"""Weights that averaging hooks exchange for a validation: which are in the model, and how to put others in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from torch import Tensor, nn

from ..measuring.untouched import unwrap


@contextmanager
def as_validated(runner: Runner) -> Iterator[bool]:
    """Block with the weights that ``EMAHook`` would let a validation see; yields whether they are others."""
    # mmpretrain's may be told to validate the weights that are being trained.
    hooks = [h for h in runner.hooks if isinstance(h, EMAHook) and getattr(h, "evaluate_on_ema", True)]
    model = unwrap(runner.model)
    before = fingerprint(model)
    for hook in hooks:
        hook._swap_ema_parameters()
    try:
        yield not torch.equal(fingerprint(model), before)
    finally:
        for hook in reversed(hooks):
            hook._swap_ema_parameters()


@contextmanager
def holding(model: nn.Module, values: list[Tensor]) -> Iterator[None]:
    """Block in which the model's parameters and buffers have these values."""
    own = [tensor.detach().clone() for tensor in tensors(model)]
    try:
        _copy(model, values)
        yield
    finally:
        _copy(model, own)


def _copy(model: nn.Module, values: list[Tensor]) -> None:
    for tensor, value in zip(tensors(model), values, strict=True):
        tensor.data.copy_(value)


def tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def fingerprint(model: nn.Module) -> Tensor:
    """Sum and norm of each parameter, in one vector."""
    weights = [parameter.detach().float() for parameter in model.parameters()]
    return torch.stack([*(weight.sum() for weight in weights), *torch._foreach_norm(weights)]).nan_to_num()
