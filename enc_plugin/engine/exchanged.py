"""Detects whether hooks such as ``EMAHook`` have exchanged the weights, and exchanges weights temporarily."""

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
    """Context with the weights that ``EMAHook`` validates; yields whether they differ from the current ones."""
    # mmpretrain's EMAHook has an option not to validate the average.
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
    """Context in which the model's parameters and buffers have the given values."""
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
    """Parameters and buffers of ``model``."""
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def fingerprint(model: nn.Module) -> Tensor:
    """Vector with the sum and norm of each parameter, to detect that weights have changed."""
    weights = [parameter.detach().float() for parameter in model.parameters()]
    return torch.stack([*(weight.sum() for weight in weights), *torch._foreach_norm(weights)]).nan_to_num()
