"""Augmentation of a whole batch on its device, by numbers that are drawn beforehand."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .pictures import Pictures
from .recipe import Recipe


@cache
def padded(pictures: Pictures, padding: int, device: torch.device) -> Tensor:
    """All pictures on the device with a black border, one copy for all runs."""
    return pad(pictures.on(device)[0], (padding,) * 4)


def augment(source: Tensor, index: Tensor, numbers: Tensor, recipe: Recipe) -> Tensor:
    """Cropped, flipped and cut pictures, as RandomCrop, RandomFlip and Cutout make them.

    Args:
        source: All pictures with their border, ``(M, C, H + 2 padding, W + 2 padding)``, uint8.
        index: Which pictures, ``(N,)``.
        numbers: Of each, as :meth:`.draws.Draws.epoch` has them, ``(N, 5)``.
        recipe: Sides and fill.

    Returns:
        ``(N, C, size, size)``, uint8.
    """
    top, left, flipped, cut_top, cut_left = numbers.long().unbind(1)
    line = torch.arange(recipe.size, device=source.device)
    rows = top[:, None] + line
    columns = left[:, None] + torch.where(flipped[:, None] == 1, recipe.size - 1 - line, line)
    channels = torch.arange(source.shape[1], device=source.device)[:, None, None]
    batch = source[index[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
    if recipe.cut is None:
        return batch
    down, across = ((line >= at[:, None]) & (line < at[:, None] + recipe.cut) for at in (cut_top, cut_left))
    square = (down[:, :, None] & across[:, None, :])[:, None]
    fill = torch.stack([torch.full((), value, dtype=batch.dtype, device=batch.device) for value in recipe.fill])
    return torch.where(square, fill[:, None, None], batch)


def mix(
    inputs: Tensor, target: Tensor, numbers: dict[str, Tensor], recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A batch mixed with itself (Mixup, CutMix), or with noise.

    Args:
        inputs: What the network receives, ``(N, C, H, W)``.
        target: Shares of the classes, ``(N, classes)``.
        numbers: ``share`` ``(2,)``, ``partner`` ``(N,)`` and ``box`` ``(4,)``, as :meth:`.draws.Draws.epoch` has them.
        recipe: How to mix.
        generator: Of the noise.
    """
    kind, strength = recipe.mixing
    if kind == "GaussianNoise":
        return inputs + strength * torch.empty_like(inputs).normal_(generator=generator), target
    (own, other), partner = numbers["share"], numbers["partner"]
    if kind == "Mixup":
        mixed = own * inputs + other * inputs[partner]
    else:
        top, bottom, left, right = numbers["box"]
        line = torch.arange(recipe.size, device=inputs.device)
        square = ((line >= top) & (line < bottom))[:, None] & (line >= left) & (line < right)
        mixed = torch.where(square, inputs[partner], inputs)
    return mixed, own * target + other * target[partner]
