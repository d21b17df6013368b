"""How weight decay is shifted in an optimizer's step, for each kind of decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..functional.decay import direction_of_rows, direction_settings, shift_direction
from ..functional.grouped import blocks_of
from ..kernels.together import effective_weights

# The shift replaces the decay term lambda W by lambda (W - eps U). How it does so depends on the optimizer:
GRADIENT = "gradient"  # It adds lambda W to the gradient (SGD, Adam). The shift adds -lambda eps U to the gradient.
WEIGHT = "weight"  # It multiplies W by 1 - lr lambda (AdamW). Before the step, the shift adds a multiple of U to W.
AROUND = "around"  # It rescales the decayed update (Lamb). During the step, W is replaced by W - eps U.
WHOLE = "whole"  # It has no decay (LBFGS, Rprop). The shift adds lambda (W - eps U) to the gradient.

# Optimizers of the kind GRADIENT that add the decay before they do anything else with the gradient.
_ADD_DECAY_FIRST = tuple(
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD")
)

Offsets = list[tuple[list[Tensor], list[Tensor]]]


def shift_group(kind: str, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> Offsets:
    """Shift the decay that the next step applies to a group of parameters, in place.

    Args:
        kind: GRADIENT, WEIGHT, AROUND or WHOLE.
        group: Parameter group with ``enc_variant``, ``shift_eps``, ``weight_decay`` and ``lr``. Parameters without a
            gradient do not change.
        grad_scale: Factor by which the gradients are still scaled (fused optimizers unscale within their kernel), or
            None.
        found_inf: 1.0 if a fused optimizer will skip the step within its kernel, or None.

    Returns:
        Offsets that :func:`restore` has to add to the weights after the step; empty unless ``kind`` is AROUND.
    """
    decay, variant, eps = group["weight_decay"], group["enc_variant"], group["shift_eps"]
    amount = decay * eps
    trained = [p for p in group["params"] if p.grad is not None]
    if not trained or kind != WHOLE and not isinstance(amount, Tensor) and amount == 0:
        return []
    if kind == WEIGHT and not isinstance(group["lr"] * decay, Tensor) and group["lr"] * decay == 1:
        kind = AROUND  # the step multiplies W by 0, so an addition to W before it would have no effect
    if kind == AROUND:
        offsets = torch._foreach_mul([shift_direction(_fixed(p), variant) for p in trained], eps)
        torch._foreach_sub_(trained, offsets)
        return [(trained, list(offsets))]
    if kind == WEIGHT:
        # The step multiplies the addition by 1 - lr lambda too, so divide by that.
        factor = group["lr"] * amount / (1 - group["lr"] * decay)
        if found_inf is not None:
            factor = factor * (1 - found_inf.clamp(max=1))
        for weights, targets in _pieces(trained, trained, variant):
            _add(targets, _directions(weights, variant), factor)
        return []
    sign: float | Tensor = -1.0 if group.get("maximize") else 1.0
    if grad_scale is not None:
        sign = sign * grad_scale
    if torch.is_grad_enabled():  # differentiable=True: the graph may still need the original gradient
        for p in trained:
            p.grad = p.grad.clone()
    for weights, grads in _pieces(trained, [p.grad for p in trained], variant):
        if kind == WHOLE:
            _add(grads, weights, sign * decay)
        _add(grads, _directions(weights, variant), sign * -amount)
    return []


def takes_decay(kind: str, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the shift may add the whole decay, which saves the optimizer a pass over gradients and weights.

    Fused optimizers would save nothing, because they decay within their only pass. A compiled step would still use
    the original decay, which is a constant in it.
    """
    is_plain = not isinstance(group["weight_decay"], Tensor) and not group.get("fused")
    is_recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return kind == GRADIENT and type(optimizer) in _ADD_DECAY_FIRST and is_plain and not is_recorded


def _pieces(weights: list[Tensor], targets: list[Tensor], variant: str) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Split weights, and the tensors to which their terms are added, into pieces that are computed together.

    On a GPU, all weights are one piece, because each kernel launch costs host time. On a CPU, a piece is some rows of a
    weight that fit into the cache, because the terms of all weights at once would need memory of the model's size.
    """
    if torch.is_grad_enabled():
        yield from (([_fixed(weight)], [target]) for weight, target in zip(weights, targets, strict=True))
    elif weights[0].is_cuda and len({(type(weight), weight.device, weight.dtype) for weight in weights}) == 1:
        yield weights, targets
    else:
        for weight, target in zip(weights, targets, strict=True):
            if weight.stride() != target.stride():
                yield [weight], [target]
            else:
                pieces = zip(blocks_of(weight, variant), blocks_of(target, variant), strict=True)
                yield from (([rows], [target_rows]) for rows, target_rows in pieces)


def _directions(weights: list[Tensor], variant: str) -> list[Tensor]:
    if len(weights) == 1:
        return [direction_of_rows(weights[0], variant)]
    return effective_weights(weights, *direction_settings(weights, variant), weights[0].dtype)


def _fixed(weight: Tensor) -> Tensor:
    # differentiable=True: the graph must not see later in-place changes of the weight.
    return weight.clone() if torch.is_grad_enabled() else weight


def _add(targets: list[Tensor], terms: list[Tensor], factor: float | Tensor) -> None:
    """``targets += factor * terms`` in place."""
    if isinstance(factor, Tensor):  # passing it as alpha would read it, which waits for the device
        torch._foreach_add_(targets, torch._foreach_mul(terms, factor.reshape(()).to(terms[0].dtype)))
    elif len(targets) == 1:
        targets[0].add_(terms[0], alpha=factor)
    else:
        torch._foreach_add_(targets, terms, alpha=factor)


def restore(offsets: Offsets) -> None:
    """Add to the weights what :func:`shift_group` subtracted from them, and empty ``offsets``."""
    for weights, taken in offsets:
        torch._foreach_add_(weights, taken)
    offsets.clear()
