"""Which kind of weight decay an optimizer has, and how its steps scale, determined by trial steps."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .shifted_decay import AROUND, GRADIENT, WEIGHT, WHOLE, Offsets, restore, shift_group

# RAdam's first five steps are steps of SGD, which do not tell the kinds apart.
_TRIAL_STEPS = 8
# Not round: a decay of 0.5 by 0.1 would equal a step by the gradient's sign with learning rate 0.05.
_TRIAL_LR, _TRIAL_DECAY = 0.0371, 0.113
_NO_DECAY = 1e-30  # not 0, and lost in rounding when it is added to anything


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
            # Without a learning rate (Adafactor), the step computes one for each weight, which WEIGHT cannot know.
            for kind in (GRADIENT, AROUND) if group["lr"] is None else (GRADIENT, WEIGHT, AROUND):
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


def shrinking_power(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[int | None, float]:
    """Determine by which power of c steps have to be rescaled for a scale-invariant weight that is c times as large.

    Its gradient is 1 / c times as long, and to rotate it by the same angle, a step has to be c times as long. The step
    of the optimizer changes by a different factor: 1 / c for SGD, 1 for Adam, which ignores the length of gradients,
    and c for LARS and Lamb, whose steps are proportional to the length of weights. Trial steps measure it, for small
    and for large gradients.

    Args:
        optimizer: Any torch optimizer; neither it, its parameters nor the random numbers are touched.
        group: One of its groups.

    Returns:
        The power of c by which a step has to be multiplied: 2 for SGD, 1 for Adam, 0 for Lamb. None if the factor is
        not an integer power, depends on the size of gradients, or no trial optimizer could be built and stepped. And
        the weight decay that stands for none in the group's steps. It is 0, or a number without an effect of its own
        if the optimizer takes other steps with decay than without (LARS and Lamb by default).
    """
    try:
        with _isolated(_trial_tensors(group)[0].device):
            power = _power(optimizer, group, 0.0)
            if group.get("weight_decay"):
                with_decay = _power(optimizer, group, _NO_DECAY)
                if with_decay != power:
                    return with_decay, _NO_DECAY
            return power, 0.0
    except Exception:  # optimizers of unknown classes can raise anything
        return None, 0.0


def _power(optimizer: torch.optim.Optimizer, group: dict[str, Any], decay: float) -> int | None:
    weight, gradient = _trial_tensors(group)
    found = []
    for size in (1.0, 1e4):
        whole, half = (
            _trial(optimizer, group, None, weight * c, gradient / c * size, decay, _TRIAL_LR / size) - weight * c
            for c in (1.0, 0.5)
        )
        found.append(1 + math.log2(half.norm() / whole.norm()))
    power = round(found[0])
    return power if all(abs(x - power) < 0.02 for x in found) else None


def _trial(
    optimizer: torch.optim.Optimizer,
    group: dict,
    kind: str | None,
    weight: Tensor,
    gradient: Tensor,
    decay: float,
    lr: float = _TRIAL_LR,
) -> Tensor:
    """Weight after a few steps of a trial optimizer; its decay is shifted as for ``kind``, or not if that is None."""
    weight = nn.Parameter(weight.clone())
    # Without the keys of this package: a class that calls super().step() would run our hooks.
    ours = ("params", "shift_eps")
    settings = {key: value for key, value in group.items() if key not in ours and not key.startswith("enc_")}
    settings |= {"weight_decay": decay, "differentiable": False}
    if settings.get("lr") is not None:
        # Different from the optimizer's default, because some optimizers multiply the decay by lr / default lr.
        settings["lr"] = torch.full_like(settings["lr"], lr) if isinstance(settings["lr"], Tensor) else lr
    trial = _trial_optimizer(optimizer, {"params": [weight], **settings})
    train = getattr(trial, "train", None)
    if callable(train):  # schedule-free optimizers step in this mode alone
        train()
    step: Any = type(optimizer).step
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
