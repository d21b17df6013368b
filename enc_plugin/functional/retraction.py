"""Projects weights onto the constraint set of eq. 19 in place, after an arbitrary step or after a rotation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grouped import blocks_of, enc_weights, factors, gathered, groups_of, in_layouts_of, normalized, rows_of
from .precision import at_least_float32
from .rotation import turn_rows_
from .weights import enc_weight, is_centered, is_whole_layer, num_rows


def retract_(weights: Sequence[Tensor], variant: str, alpha: float) -> None:
    """Project weights onto the constraint set in place, by :func:`~enc_plugin.functional.enc_weight`.

    Args:
        weights: As in ``enc_weight``.
        variant: ``'fro'``, ``'wn'``, ``'ws'`` or ``'centered_fro'``, for all of them.
        alpha: Squared norm of each weight afterwards, a positive number.
    """
    if _are_alike(weights):
        retract_together_(weights, variant, alpha)
        return
    for weight in weights:
        for block in blocks_of(weight, variant):
            block.copy_(_share(block, weight, variant, alpha))


def turn_(
    weights: Sequence[Tensor], before: Sequence[Tensor], angle: float | Tensor, variant: str, alpha: float
) -> None:
    """Replace the last step of weights by a rotation in its direction, in place; they end on the constraint set.

    Args:
        weights: The weights after the step.
        before: The weights before it, on the constraint set, in the memory formats of ``weights``.
        angle: Angle of each row's rotation in radians (:func:`~enc_plugin.functional.rotation.rotate`).
        variant: As in :func:`retract_`.
        alpha: As in :func:`retract_`.
    """
    if _are_alike(weights):
        turn_together_(weights, before, angle, variant, alpha)
        return
    for weight, old in zip(weights, before, strict=True):
        for block, start in zip(blocks_of(weight, variant), blocks_of(old, variant), strict=True):
            rows, dtype = num_rows(block, variant), at_least_float32(block.dtype)
            w, u = (x.reshape(rows, -1).to(dtype) for x in (start, block.sub_(start)))
            turn_rows_([w], [u], angle, is_centered(variant))
            block.copy_(_share(u.reshape(block.shape), weight, variant, alpha))


def _share(block: Tensor, weight: Tensor, variant: str, alpha: float) -> Tensor:
    """Project a block of rows of a weight: its squared norm becomes the rows' share of ``alpha``."""
    return enc_weight(block, variant, alpha * (len(block) / len(weight)))


def _are_alike(weights: Sequence[Tensor]) -> bool:
    """Whether to compute weights together: on a GPU, because there each operation costs host time."""
    return bool(weights) and weights[0].is_cuda and len({(weight.device, weight.dtype) for weight in weights}) == 1


def retract_together_(weights: Sequence[Tensor], variant: str, alpha: float) -> None:
    """:func:`retract_` for one device and dtype. The number of operations depends on row lengths, not on layers."""
    torch._foreach_copy_(list(weights), enc_weights(weights, variant, [alpha] * len(weights)))


def turn_together_(
    weights: Sequence[Tensor], before: Sequence[Tensor], angle: float | Tensor, variant: str, alpha: float
) -> None:
    """:func:`turn_` for one device and dtype. The number of operations depends on row lengths, not on layers."""
    torch._foreach_sub_(list(weights), list(before))
    groups = groups_of(weights, variant)
    own = [[weights[i] for i in members] for members in groups]
    us = [gathered([rows_of(weight) for weight in group], variant) for group in own]
    ws = [gathered([rows_of(before[i]) for i in members], variant) for members in groups]
    ws, turned = ([x.flatten(1) for x in xs] if is_whole_layer(variant) else xs for xs in (ws, us))
    turn_rows_(ws, turned, angle, is_centered(variant))
    results: list[Tensor] = []
    for group, u in zip(own, us, strict=True):
        what, _ = normalized(u, variant, factors(group, variant, [alpha] * len(group)))
        results += in_layouts_of(group, what.to(group[0].dtype))
    torch._foreach_copy_([weight for group in own for weight in group], results)
