"""How optimizers apply weight decay, determined by trial steps, and how the decay is shifted for each kind."""

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

_PIECE = 2**18  # elements: 1 MB in float32

# RAdam's first five steps are steps of SGD, which do not tell the kinds apart.
_TRIAL_STEPS = 8
# Not round: a decay of 0.5 by 0.1 would equal a step by the gradient's sign with learning rate 0.05.
_TRIAL_LR, _TRIAL_DECAY = 0.0371, 0.113

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
        return [(trained, offsets)]
    if kind == WEIGHT:
        # The step multiplies the addition by 1 - lr lambda too, so divide by that.
        factor = group["lr"] * amount / (1 - group["lr"] * decay)
        if found_inf is not None:
            factor = factor * (1 - found_inf.clamp(max=1))
        for weights, targets in _pieces(trained, trained, variant):
            _add(targets, shift_directions(weights, variant), factor)
        return []
    sign = -1.0 if group.get("maximize") else 1.0
    if grad_scale is not None:
        sign = sign * grad_scale
    if torch.is_grad_enabled():  # differentiable=True: the graph may still need the original gradient
        for p in trained:
            p.grad = p.grad.clone()
    for weights, grads in _pieces(trained, [p.grad for p in trained], variant):
        if kind == WHOLE:
            _add(grads, weights, sign * decay)
        _add(grads, shift_directions(weights, variant), sign * -amount)
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

    On a GPU, a piece is a group of weights, because each kernel launch costs host time. On a CPU, it is some rows of a
    weight that fit into the cache, because the terms of all weights at once would need memory of the model's size.
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
    # differentiable=True: the graph must not see later in-place changes of the weight.
    return weight.clone() if torch.is_grad_enabled() else weight


def _add(targets: list[Tensor], terms: list[Tensor], factor: float | Tensor) -> None:
    """``targets += factor * terms`` in place."""
    if isinstance(factor, Tensor):  # passing it as alpha would read it, which waits for the device
        torch._foreach_addcmul_(targets, terms, [factor.to(terms[0].dtype)] * len(terms))
    elif len(targets) == 1:
        targets[0].add_(terms[0], alpha=factor)
    else:
        torch._foreach_add_(targets, terms, alpha=factor)


def restore(offsets: Offsets) -> None:
    """Add to the weights what :func:`shift_group` subtracted from them, and empty ``offsets``."""
    for weights, taken in offsets:
        torch._foreach_add_(weights, taken)
    offsets.clear()


def decay_kind(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> str | None:
    """Determine how ``optimizer`` decays the weights of ``group``, by steps of a small trial optimizer.

    The trial optimizer has the class and settings of ``optimizer``. The shifted decay vanishes where W = eps U, so
    under the right kind of shift and a zero gradient, the trial optimizer leaves W = eps U unchanged.

    Args:
        optimizer: Any torch optimizer; neither it, its parameters nor the random numbers are touched.
        group: One of its groups.

    Returns:
        GRADIENT, WEIGHT, AROUND or WHOLE, or None if no trial optimizer could be built and stepped.
    """
    fixed_point, gradient = _trial_tensors(group)

    def end(kind: str | None, gradient: Tensor, decay: float) -> Tensor:
        return _trial(optimizer, group, kind, fixed_point, gradient, decay)

    try:
        with _isolated(fixed_point.device):
            effect = (end(None, gradient, _TRIAL_DECAY) - end(None, gradient, 0.0)).abs().max()
            if effect == 0:
                return WHOLE
            for kind in (GRADIENT, WEIGHT, AROUND):
                if (end(kind, torch.zeros_like(gradient), _TRIAL_DECAY) - fixed_point).abs().max() <= 1e-3 * effect:
                    return kind
    except Exception:  # optimizers of unknown classes can raise anything
        return None
    return None


def _trial_tensors(group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Weight and gradient for a trial, in float64, on the device of the group's parameters."""
    first = group["params"][0]
    device = first.device if first.device.type in ("cpu", "cuda") else torch.device("cpu")
    # Rows of norm 1 that normalize without rounding: a quotient of two rounding errors would look like a step.
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], device=device)
    weight = 0.5 * signs.to(torch.float64).reshape(4, 4, *[1] * max(first.ndim - 2, 0))
    # Small enough for the decay to change the sign of some gradients: optimizers that use only the sign show no other
    # effect of the decay.
    gradient = 0.1 * torch.linspace(-1, 1, weight.numel(), device=device, dtype=weight.dtype).reshape(weight.shape)
    return weight, gradient


@contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Keep the random state and run without compilation, which would take longer than the trial."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), torch.enable_grad():
        yield


def shrinking_power(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> int | None:
    """Determine by which power of c steps have to be rescaled for a scale-invariant weight that is c times as large.

    Its gradient is 1 / c times as long, and to rotate it by the same angle, a step has to be c times as long. The step
    of the optimizer changes by a different factor: 1 / c for SGD, 1 for Adam, which ignores the length of gradients,
    and c for LARS and Lamb, whose steps are proportional to the length of weights. Trial steps measure it.

    Args:
        optimizer: Any torch optimizer; neither it, its parameters nor the random numbers are touched.
        group: One of its groups.

    Returns:
        The power of c by which a step has to be multiplied: 2 for SGD, 1 for Adam, 0 for Lamb. None if the factor is
        not an integer power, or no trial optimizer could be built and stepped.
    """
    weight, gradient = _trial_tensors(group)
    try:
        with _isolated(weight.device):
            whole, half = (
                (_trial(optimizer, group, None, weight * scale, gradient / scale, 0.0) - weight * scale).norm()
                for scale in (1.0, 0.5)
            )
            power = 1 + math.log2(half / whole)
    except Exception:  # optimizers of unknown classes can raise anything
        return None
    return round(power) if abs(power - round(power)) < 0.02 else None


def _trial(
    optimizer: torch.optim.Optimizer, group: dict, kind: str | None, weight: Tensor, gradient: Tensor, decay: float
) -> Tensor:
    """Weight after a few steps of a trial optimizer; its decay is shifted as for ``kind``, or not if that is None."""
    weight = nn.Parameter(weight.clone())
    # Without the keys of this package: a class that calls super().step() would run our hooks.
    ours = ("params", "shift_eps")
    settings = {key: value for key, value in group.items() if key not in ours and not key.startswith("enc_")}
    settings |= {"weight_decay": decay, "differentiable": False}
    if settings.get("lr") is not None:
        # Different from the optimizer's default, because some optimizers multiply the decay by lr / default lr.
        settings["lr"] = torch.full_like(settings["lr"], _TRIAL_LR) if isinstance(settings["lr"], Tensor) else _TRIAL_LR
    trial = _trial_optimizer(optimizer, {"params": [weight], **settings})
    step = type(optimizer).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step  # without any step hooks
    closure = [lambda: weight.new_zeros(())] if "closure" in inspect.signature(step).parameters else []
    for _ in range(_TRIAL_STEPS):
        weight.grad = gradient.clone()
        offsets: Offsets = []
        if kind is not None:
            with torch.no_grad():
                shift = {"enc_variant": "wn", "shift_eps": 1.0}
                offsets = shift_group(kind, {**trial.param_groups[0], **shift}, None, None)
        step(trial, *closure)
        with torch.no_grad():
            restore(offsets)
    return weight.detach()


def _trial_optimizer(optimizer: torch.optim.Optimizer, group: dict) -> torch.optim.Optimizer:
    """Build an optimizer of the same class for ``group``, by its constructor or, if that fails, by ``__setstate__``."""
    cls = type(optimizer)
    defaults = {**optimizer.defaults, "differentiable": False}
    try:
        known = inspect.signature(cls).parameters
        return cls([group], **{key: value for key, value in defaults.items() if key in known})
    except Exception:  # constructors of unknown classes can raise anything
        trial = cls.__new__(cls)
        trial.__setstate__({"defaults": defaults, "state": defaultdict(dict), "param_groups": [{**defaults, **group}]})
        return trial
