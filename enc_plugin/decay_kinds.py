"""How optimizers decay weights: the ways to shift a decay, and the one that fits an optimizer, found by a trial."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .functional.decay import shift_direction, shift_directions
from .functional.grouped import groups_of, has_whole_rows, rows_of
from .functional.weights import is_whole_layer

# The decay term lambda W becomes lambda (W - eps U). Which of these does that depends on how the optimizer decays.
GRADIENT = "gradient"  # it adds lambda W to the gradient (SGD, Adam): so -lambda eps U joins the gradient
WEIGHT = "weight"  # it multiplies W by 1 - lr lambda (AdamW): W grows beforehand by what the product then leaves
AROUND = "around"  # it scales the decayed update (Lamb): the step sees W - eps U in the place of W
WHOLE = "whole"  # it has no decay (LBFGS, Rprop): the regularizer's whole gradient joins the gradient

# Torch's optimizers of the first kind do so before anything else.
_ADD_DECAY_FIRST = tuple(
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD")
)

_PIECE = 2**18  # elements: 1 MB in float32

# RAdam's first five steps are those of SGD, with which all ways agree.
_TRIAL_STEPS = 8
# No round numbers: a decay by 0.1 of 0.5 would equal a step by the gradient's sign with learning rate 0.05.
_TRIAL_LR, _TRIAL_DECAY = 0.0371, 0.113

Offsets = list[tuple[list[Tensor], list[Tensor]]]


def shift_group(kind: str, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> Offsets:
    """Shift the decay that the next step applies to a group of parameters, in place.

    Args:
        kind: One of the four ways above.
        group: Parameter group with ``enc_variant``, ``shift_eps``, ``weight_decay`` and ``lr``. Parameters without a
            gradient are left alone.
        grad_scale: Factor that is still in the gradients (fused optimizers unscale within their kernel), or None.
        found_inf: 1.0 where a fused optimizer will skip the step within its kernel, or None.

    Returns:
        What :func:`restore` adds to the weights after the step.
    """
    decay, variant, eps = group["weight_decay"], group["enc_variant"], group["shift_eps"]
    amount = decay * eps
    trained = [p for p in group["params"] if p.grad is not None]
    if not trained or kind != WHOLE and not isinstance(amount, Tensor) and amount == 0:
        return []
    if kind == WEIGHT and not isinstance(group["lr"] * decay, Tensor) and group["lr"] * decay == 1:
        kind = AROUND  # the step forgets W altogether, whatever it grew to
    if kind == AROUND:
        offsets = torch._foreach_mul([shift_direction(_fixed(p), variant) for p in trained], eps)
        torch._foreach_sub_(trained, offsets)
        return [(trained, offsets)]
    if kind == WEIGHT:
        # The step will multiply by (1 - lr lambda): divide by it beforehand, so that the shift is exact.
        factor = group["lr"] * amount / (1 - group["lr"] * decay)
        if found_inf is not None:
            factor = factor * (1 - found_inf.clamp(max=1))
        for weights, targets in _pieces(trained, trained, variant):
            _add(targets, shift_directions(weights, variant), factor)
        return []
    sign = -1.0 if group.get("maximize") else 1.0
    if grad_scale is not None:
        sign = sign * grad_scale
    if torch.is_grad_enabled():  # the gradient's own history must stay as it is
        for p in trained:
            p.grad = p.grad.clone()
    for weights, grads in _pieces(trained, [p.grad for p in trained], variant):
        if kind == WHOLE:
            _add(grads, weights, sign * decay)
        _add(grads, shift_directions(weights, variant), sign * -amount)
    return []


def takes_decay(kind: str, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the shift may add the whole decay, so that the optimizer saves a pass over gradients and weights.

    Fused optimizers save nothing: they decay within their only pass. What is compiled knows the decay as it was.
    """
    is_plain = not isinstance(group["weight_decay"], Tensor) and not group.get("fused")
    is_recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return kind == GRADIENT and type(optimizer) in _ADD_DECAY_FIRST and is_plain and not is_recorded


def _pieces(weights: list[Tensor], targets: list[Tensor], variant: str) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Weights, and what their terms are added to, in the pieces whose terms are computed at once.

    On a GPU, where each operation costs the host time, groups of weights. On a CPU, rows that fit into its cache: the
    terms of all weights would be memory of the model's size, taken at every step.
    """
    if torch.is_grad_enabled():
        yield from (([_fixed(weight)], [target]) for weight, target in zip(weights, targets, strict=True))
    elif weights[0].is_cuda and len({(type(weight), weight.device, weight.dtype) for weight in weights}) == 1:
        for members in groups_of(weights, variant):
            yield [weights[i] for i in members], [targets[i] for i in members]
    else:
        for weight, target in zip(weights, targets, strict=True):
            if is_whole_layer(variant) or weight.stride() != target.stride() or not has_whole_rows(weight):
                yield [weight], [target]
            else:
                count = max(1, _PIECE * len(weight) // weight.numel())
                pieces = zip(rows_of(weight).split(count), rows_of(target).split(count), strict=True)
                yield from (([rows], [target_rows]) for rows, target_rows in pieces)


def _fixed(weight: Tensor) -> Tensor:
    # differentiable=True: what the graph remembers must not change with the weight.
    return weight.clone() if torch.is_grad_enabled() else weight


def _add(targets: list[Tensor], terms: list[Tensor], factor: float | Tensor) -> None:
    """``targets += factor * terms`` in place."""
    if isinstance(factor, Tensor):  # as an alpha it would be read, which waits for the device
        torch._foreach_addcmul_(targets, terms, [factor.to(terms[0].dtype)] * len(terms))
    elif len(targets) == 1:
        targets[0].add_(terms[0], alpha=factor)
    else:
        torch._foreach_add_(targets, terms, alpha=factor)


def restore(offsets: Offsets) -> None:
    """Add back what :func:`shift_group` took from the weights, and empty ``offsets``."""
    for weights, taken in offsets:
        torch._foreach_add_(weights, taken)
    offsets.clear()


def decay_kind(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> str | None:
    """Find how ``optimizer`` decays the weights of ``group``: steps of a small twin, with its class and settings.

    The shifted decay vanishes where W = eps U. The right way to shift is the one with which the twin, without a
    gradient, rests there.

    Args:
        optimizer: Any torch optimizer; neither it, its parameters nor the random numbers are touched.
        group: One of its groups.

    Returns:
        One of the four ways above, or None if no twin could be made and stepped.
    """
    rest, pull = _trial_weight(group)

    def end(kind: str | None, gradient: Tensor, decay: float) -> Tensor:
        return _trial(optimizer, group, kind, rest, gradient, decay)

    try:
        with _quietly(rest.device):
            effect = (end(None, pull, _TRIAL_DECAY) - end(None, pull, 0.0)).abs().max()
            if effect == 0:
                return WHOLE
            for kind in (GRADIENT, WEIGHT, AROUND):
                if (end(kind, torch.zeros_like(pull), _TRIAL_DECAY) - rest).abs().max() <= 1e-3 * effect:
                    return kind
    except Exception:  # any: the class is unknown, and so is what it needs
        return None
    return None


def _trial_weight(group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Weight of a trial, on the device of the group's, and a gradient."""
    first = group["params"][0]
    device = first.device if first.device.type in ("cpu", "cuda") else torch.device("cpu")
    # Rows of norm 1 whose direction is free of rounding: a quotient of two rounding errors would look like a step.
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], device=device)
    weight = 0.5 * signs.to(torch.float64).reshape(4, 4, *[1] * max(first.ndim - 2, 0))
    # So small that the decay changes the sign of some gradients: the only thing that optimizers by sign would show.
    pull = 0.1 * torch.linspace(-1, 1, weight.numel(), device=device, dtype=weight.dtype).reshape(weight.shape)
    return weight, pull


@contextmanager
def _quietly(device: torch.device) -> Iterator[None]:
    """Block for trials: some optimizers draw random numbers, or compile their step, which takes longer than a trial."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), torch.enable_grad():
        yield


def shrinking_power(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> int | None:
    """Find how steps have to be rescaled for a scale-invariant weight that is c times as large.

    Its gradient is 1 / c times as long, and to turn it as far, a step has to be c times as long. The optimizer's own
    becomes longer by another factor: 1 / c for SGD, 1 for Adam, which ignores the length of gradients, and c for LARS
    and Lamb, which go by the length of weights. Steps of a small twin tell.

    Args:
        optimizer: Any torch optimizer; neither it, its parameters nor the random numbers are touched.
        group: One of its groups.

    Returns:
        The power of c that a step has to be multiplied by: 2 for SGD, 1 for Adam, 0 for Lamb; None if the factor is no
        power, or no twin could be made and stepped.
    """
    weight, pull = _trial_weight(group)
    try:
        with _quietly(weight.device):
            whole, half = (
                (_trial(optimizer, group, None, weight * scale, pull / scale, 0.0) - weight * scale).norm()
                for scale in (1.0, 0.5)
            )
            power = 1 + math.log2(half / whole)
    except Exception:  # any: the class is unknown, and so is what it needs
        return None
    return round(power) if abs(power - round(power)) < 0.02 else None


def _trial(
    optimizer: torch.optim.Optimizer, group: dict, kind: str | None, weight: Tensor, gradient: Tensor, decay: float
) -> Tensor:
    """Where a few steps of a twin of ``optimizer`` take ``weight``; ``kind`` None leaves its decay as it is."""
    weight = nn.Parameter(weight.clone())
    # Without ours: the twin of a class that calls super().step() meets our hooks.
    ours = ("params", "shift_eps")
    settings = {key: value for key, value in group.items() if key not in ours and not key.startswith("enc_")}
    settings |= {"weight_decay": decay, "differentiable": False}
    if settings.get("lr") is not None:
        # Another one than the optimizer's default: some multiply the decay by lr / default lr.
        settings["lr"] = torch.full_like(settings["lr"], _TRIAL_LR) if isinstance(settings["lr"], Tensor) else _TRIAL_LR
    twin = _twin(optimizer, {"params": [weight], **settings})
    step = type(optimizer).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step  # no one's hooks
    closure = [lambda: weight.new_zeros(())] if "closure" in inspect.signature(step).parameters else []
    for _ in range(_TRIAL_STEPS):
        weight.grad = gradient.clone()
        offsets: Offsets = []
        if kind is not None:
            with torch.no_grad():
                shift = {"enc_variant": "wn", "shift_eps": 1.0}
                offsets = shift_group(kind, {**twin.param_groups[0], **shift}, None, None)
        step(twin, *closure)
        with torch.no_grad():
            restore(offsets)
    return weight.detach()


def _twin(optimizer: torch.optim.Optimizer, group: dict) -> torch.optim.Optimizer:
    """Make another optimizer of the class, by its constructor or, if that takes other arguments, as unpickling does."""
    cls = type(optimizer)
    defaults = {**optimizer.defaults, "differentiable": False}
    try:
        known = inspect.signature(cls).parameters
        return cls([group], **{key: value for key, value in defaults.items() if key in known})
    except Exception:  # any: the constructor is someone else's
        twin = cls.__new__(cls)
        twin.__setstate__({"defaults": defaults, "state": defaultdict(dict), "param_groups": [{**defaults, **group}]})
        return twin
