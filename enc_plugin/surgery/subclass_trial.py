"""What a subclass of a stock layer does with its weight and bias, found by trying a copy of it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ..layers import ENC_LAYERS, StockLayer, enc_class, reserved_attributes


@torch.no_grad()
def weight_problem(layer: StockLayer) -> str | None:
    """Why a layer cannot be ENC, or None: its output must be proportional to the weight that it owns.

    A layer that normalises its own weight does not double its output with it.
    """
    name = type(layer).__name__
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        if any(isinstance(hook, prune.BasePruningMethod) for hook in layer._forward_pre_hooks.values()):
            return f"the weight of this {name} is pruned; convert it first and prune it then"
        made_by = "a parametrization" if parametrize.is_parametrized(layer, "weight") else "a hook or another module"
        return f"the weight of this {name} is computed from other parameters ({made_by})"
    if isinstance(layer.weight, nn.UninitializedParameter):
        return f"{name} has no weight before its first forward pass"
    if type(layer) in ENC_LAYERS:
        return None
    trial, weight, x = _trial_copy(layer)
    try:
        once, twice = (trial.forward_with(factor * weight, x) for factor in (1, 2))
    except Exception as error:
        return f"{name} does not run on its own: {error}"
    if not once.any() or not _all_close(twice, 2 * once):
        return f"{name} transforms its weight itself"
    taken = reserved_attributes(layer)
    if taken:
        return f"{name} has attributes whose names ENC layers need ({', '.join(taken)})"
    return None


@torch.no_grad()
def post_norm_problem(layer: StockLayer) -> str | None:
    """Why no batch norm of its own can follow a layer, or None: ``fold`` merges it into weight and bias alone.

    The layer's output has to be ``W x + b``, with nothing behind the sum (an activation, a factor).
    """
    if _stock_class(layer) in ENC_LAYERS:
        return None
    trial, weight, x = _trial_copy(layer)
    out, negative = (trial.forward_with(sign * weight, x) for sign in (1, -1))
    bias = torch.arange(1.0, 1 + len(weight))
    trial._parameters["bias"] = nn.Parameter(bias)
    shape = (1, -1) + (1,) * (weight.ndim - 2)
    if _all_close(negative, -out) and _all_close(trial.forward_with(weight, x), out + bias.view(shape)):
        return None
    name = _stock_class(layer).__name__
    return f"{name} does more than add its bias to W x, so that the batch norm due behind it could not be folded"


def _stock_class(layer: nn.Module) -> type[nn.Module]:
    return getattr(layer, "plain_class", type(layer))


def _trial_copy(layer: StockLayer) -> tuple[Any, Tensor, Tensor]:
    """A copy of ``layer`` as an ENC layer on the CPU, with parameters of zero; a weight and an input for it."""
    trial: Any = copy.deepcopy(layer).to_empty(device="cpu").float().eval()
    for tensor in (*trial.parameters(), *trial.buffers()):
        tensor.zero_()
    for module in trial.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # a norm of zeros would hide the output
            module.reset_parameters()
    trial.__class__ = enc_class(_stock_class(layer))
    weight = torch.arange(1.0, 1 + trial.weight.numel()).sin().view_as(trial.weight)
    shape: tuple[int, ...]
    if isinstance(layer, nn.Linear):
        shape = (2, layer.in_features)
    else:
        spatial = ((k - 1) * d + 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
        shape = (2, layer.in_channels, *spatial)
    return trial, weight, torch.arange(1.0, 1 + math.prod(shape)).cos().view(shape)


def _all_close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())
