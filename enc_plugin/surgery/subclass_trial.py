"""Tests on a copy of a layer: whether a subclass of a stock layer can be ENC and can have a post-norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ..functional.precision import full_float32
from ..layers import ENC_LAYERS, StockLayer, enc_class, reserved_attributes
from ..layers.reparametrized import deep_copy


@torch.no_grad()
@full_float32()
def weight_problem(layer: StockLayer) -> str | None:
    """The reason why a layer cannot be ENC, or None.

    The output must be proportional to the weight. This fails if the layer normalises its weight itself. The layer must
    not write to its weight, as adapters do that merge themselves (loralib): it would write to the free weight.
    """
    name = type(layer).__name__
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        if any(isinstance(hook, prune.BasePruningMethod) for hook in layer._forward_pre_hooks.values()):
            return f"the weight of this {name} is pruned; convert the layer first and prune it afterwards"
        made_by = "a parametrization" if parametrize.is_parametrized(layer, "weight") else "a hook or another module"
        return f"the weight of this {name} is computed from other parameters ({made_by})"
    if isinstance(layer.weight, nn.UninitializedParameter):
        return f"{name} has no weight before its first forward pass"
    if not layer.weight.is_floating_point():
        return f"the weight of this {name} is {layer.weight.dtype}, not of real numbers"
    if parametrize.is_parametrized(layer):
        return f"{name}: a parameter other than its weight is parametrized; convert first and parametrize afterwards"
    if type(layer) in ENC_LAYERS:
        return None
    if any("fake_quant_enabled" in module._buffers for module in layer.modules()):  # the trial copy has it turned off
        return f"{name} quantises its weight; train first, and quantise the folded network"
    trial, weight, x = _trial_copy(layer)
    try:
        once, twice = (trial.forward_with(factor * weight, x) for factor in (1, 2))
        writes_weight = _writes_weight(layer)
    except Exception as error:
        return f"{name} does not run outside of the network: {error}"
    if not once.any() or not _all_close(twice, 2 * once):
        return f"{name} transforms its weight itself"
    if writes_weight:
        return f"{name} changes its weight in train() and eval()"
    taken = reserved_attributes(layer)
    if taken:
        return f"{name} has attributes whose names ENC layers need ({', '.join(taken)})"
    return None


@torch.no_grad()
@full_float32()
def post_norm_problem(layer: StockLayer) -> str | None:
    """The reason why a layer cannot have a post-norm, or None.

    ``fold`` merges the post-norm into weight and bias, so the output must be ``W x + b`` without a further operation
    (an activation, a factor).
    """
    if _stock_class(layer) in ENC_LAYERS:
        return None
    trial, weight, x = _trial_copy(layer)
    out, negative = (trial.forward_with(sign * weight, x) for sign in (1, -1))
    bias = _counted(weight.shape[:1])
    trial._parameters["bias"] = nn.Parameter(bias)
    shape = (1, -1) + (1,) * (weight.ndim - 2)
    if _all_close(negative, -out) and _all_close(trial.forward_with(weight, x), out + bias.view(shape)):
        return None
    name = _stock_class(layer).__name__
    return f"{name} does more than add its bias to W x, so the batch norm that it needs could not be folded"


def _writes_weight(layer: StockLayer) -> bool:
    trial = deep_copy(layer).to_empty(device="cpu").float()
    for tensor in trial.parameters():
        tensor.fill_(1)  # with adapters of zero, as they start, merging would change nothing
    before = trial.train().weight.clone()
    return not torch.equal(trial.eval().weight, before)


def _stock_class(layer: nn.Module) -> type[nn.Module]:
    return getattr(layer, "plain_class", type(layer))


def _trial_copy(layer: StockLayer) -> tuple[Any, Tensor, Tensor]:
    """A copy of ``layer`` as an ENC layer on the CPU, with all parameters zero, and a weight and an input for it."""
    trial: Any = deep_copy(layer).to_empty(device="cpu").float().eval()
    for tensor in (*trial.parameters(), *trial.buffers()):
        tensor.zero_()
    for module in trial.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # with a weight of zero, it would hide the output
            module.reset_parameters()
    trial.__class__ = enc_class(_stock_class(layer))
    weight = _counted(trial.weight.shape).sin()
    shape: tuple[int, ...]
    if isinstance(layer, nn.Linear):
        shape = (2, layer.in_features)
    else:
        spatial = ((k - 1) * d + 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
        shape = (2, layer.in_channels, *spatial)
    return trial, weight, _counted(shape).cos()


def _counted(shape: tuple[int, ...]) -> Tensor:
    """1, 2, 3, ... in float32 on the CPU, whatever torch's default dtype and device are."""
    return torch.arange(1, 1 + math.prod(shape), device="cpu").float().view(shape)


def _all_close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())
