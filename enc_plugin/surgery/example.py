"""Inputs for recording a forward pass: given by the user, or generated from the shapes of the layers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

# Sides in pixels. A pass on meta tensors costs the same at any size; a pass that computes values does not.
_SIZES = (224, 32, 64, 128, 256, 299, 384, 512, 28, 96, 48, 16, 8)
_SIZES_FOR_VALUES = (64, 224, 32)
_LENGTHS = (256, 64, 1024, 16000)
_CLIPS = ((16, 112, 112), (8, 32, 32), (32, 32, 32))
_TOKENS = (8, 50, 197, 49, 64)

Arguments = tuple[tuple, dict[str, Any]]


def as_arguments(example: Any) -> Arguments:
    """Positional and keyword arguments of ``example``: a tensor, a tuple or list of arguments, or a dict of them."""
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def made_up(model: nn.Module, for_values: bool = False) -> Iterator[Arguments]:
    """Generate arguments that ``model`` may accept, the likeliest first, with the input shapes of its first layers.

    If the forward has several required arguments, each is the same tensor. A tuple of the tensor is also tried, for
    heads that take a tuple of features.

    Args:
        model: The network.
        for_values: For a pass that computes values: generate fewer and smaller inputs, filled with noise, on the
            model's device. Otherwise generate meta tensors.
    """
    dtype = _like(model).dtype
    required = _required_arguments(model)
    for shape, are_tokens in _shapes(model, for_values):
        x = torch.empty(shape, dtype=torch.long if are_tokens else dtype, device="meta")
        tensors: Arguments = ((x,) * required, {})
        tuples: Arguments = (((x,),) * required, {})
        for arguments in (tensors, tuples):
            yield with_values(arguments, model) if for_values else arguments


def with_values(arguments: Arguments, model: nn.Module) -> Arguments:
    """Replace meta tensors by noise (integers by zeros) on the device of ``model``."""
    device = _like(model).device

    def fill(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_meta:
            return x
        if not x.is_floating_point():
            return torch.zeros(x.shape, dtype=x.dtype, device=device)
        generator = torch.Generator().manual_seed(0)  # does not change the global random state
        noise = torch.randn(math.prod(x.shape), generator=generator, dtype=torch.float32, device="cpu").view(x.shape)
        return noise.to(device, x.dtype)

    filled: Arguments = tree_map(fill, arguments)
    return filled


def _like(model: nn.Module) -> Tensor:
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _shapes(model: nn.Module, for_values: bool) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Shapes of batches of two samples, and whether the network takes integers (tokens)."""
    firsts: dict[type[nn.Module], nn.Module] = {}
    for module in model.modules():
        for kind in (nn.Conv2d, nn.Conv1d, nn.Conv3d, nn.Linear, nn.Embedding):
            if isinstance(module, kind):
                firsts.setdefault(kind, module)
    stated = _stated_sizes(model)
    sizes = list(dict.fromkeys([*stated, *((s, s) for s in (_SIZES_FOR_VALUES if for_values else _SIZES))]))
    tokens = list(dict.fromkeys([*_TOKENS, *(h * w + extra for h, w in stated if h * w <= 4096 for extra in (0, 1))]))
    for layer in firsts.values():
        if isinstance(layer, nn.Conv2d):
            yield from (((2, layer.in_channels, *size), False) for size in sizes)
        elif isinstance(layer, nn.Conv1d):
            yield from (((2, layer.in_channels, length), False) for length in _LENGTHS)
        elif isinstance(layer, nn.Conv3d):
            yield from (((2, layer.in_channels, *clip), False) for clip in _CLIPS)
        elif isinstance(layer, nn.Embedding):
            yield from (((2, length), True) for length in tokens)
        elif isinstance(layer, nn.Linear):
            flat: list[tuple[int, ...]] = [(2, layer.in_features)]
            sequences: list[tuple[int, ...]] = [(2, length, layer.in_features) for length in tokens]
            # A 2-D input of attention is a sequence without a batch dimension, for which it runs other code.
            has_attention = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
            yield from ((shape, False) for shape in (sequences + flat if has_attention else flat + sequences))


def _stated_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Image and window sizes from attributes of modules (timm's ``img_size``, torchvision's ``image_size``, ...)."""
    found = []
    for module in model.modules():
        for name in ("img_size", "image_size", "input_size", "window_size"):
            size = getattr(module, name, None)
            if isinstance(size, int) and not isinstance(size, bool):
                size = (size, size)
            if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size):
                found.append(tuple(size))
    return list(dict.fromkeys(found))[:4]


def _required_arguments(model: nn.Module) -> int:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return min(3, max(1, sum(p.kind in positional and p.default is p.empty for p in parameters)))
