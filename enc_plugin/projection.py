"""ENC as a projection, for any optimizer: each step ends with the weights of a group on the constraint set.

The network stays the stock network, and eq. 19 holds for the weights themselves. A parameter group asks for the
projection by ``enc_projection``, ``enc_variant`` and ``enc_alpha``, which copies and state dicts keep. Importing this
module registers a step hook for all optimizers of the process. The hook ignores all other groups.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .carried_hooks import carry_load_hook
from .decay_kinds import shrinking_power
from .functional.checks import check_type
from .functional.retraction import retract_, turn_
from .functional.rotation import equilibrium_angle
from .functional.weights import check_alpha, check_variant, is_centered, num_rows
from .running_step import RunningStep, calling_frame, steps_itself

MODES = {
    "retract": "the optimizer's own step, then a projection onto the constraint set",
    "rotate": "a rotation in the direction of the optimizer's step, by the angle of plain training in equilibrium",
}

# Settings of a group, and what the first step adds to them.
PROJECTION_SETTINGS = ("enc_projection", "enc_variant", "enc_alpha")
_FOUND = ("enc_power", "enc_decay", "enc_shrink")

Group = dict[str, Any]


def check_mode(mode: str) -> None:
    """Raise ``ValueError`` unless ``mode`` is ``'retract'`` or ``'rotate'``."""
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"projection: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")


def add_projection(optimizer: Optimizer) -> None:
    r"""Project the weights of an optimizer's groups onto the constraint set, now and at the end of each step.

    Call it after weights are initialised or loaded and before the first forward pass. Every optimizer projects each
    group that has ``enc_projection``, even without this call. Then the first step projects the initial weights, by
    :func:`~enc_plugin.functional.enc_weight`. Behind a batch norm, ``'fro'`` and ``'wn'`` do not change the function of
    the network; ``'ws'`` and ``'centered_fro'`` do, because they remove means. The two modes replace a step of the
    plain optimizer as follows:

    - ``'retract'``: the optimizer's step, then the projection. Let R be the initial norm of a layer and r the norm on
      the set. On the set, the gradient is R / r times as long, while a step that turns the weight as far has to be r /
      R times as long. So gradients are multiplied by :math:`(r / R)^2 = \alpha / \lVert W \rVert_F^2`. The steps of
      optimizers that ignore the length of gradients (Adam) are multiplied by r / R; steps that are proportional to the
      length of weights (Lamb) stay as they are. So the learning rate acts as in a plain network that keeps its initial
      norms. Weight decay has no effect, because it changes norms only.
    - ``'rotate'``: every row (whole-layer variants: the layer) turns in the direction of the optimizer's step. The
      angle is the one by which plain training with this learning rate and decay turns it, once norms are in equilibrium
      (:func:`~enc_plugin.functional.rotation.equilibrium_angle`).

    The call moves the decay of such groups from ``weight_decay`` to ``enc_decay``. Clip gradients before the step, as
    usual; they are the gradients on the set. A weight that is pruned or parametrized afterwards is projected as a
    whole, so the part that the network computes with leaves the set (``audit`` shows by how much). Between steps, a CPU
    keeps copies of the weights for ``'rotate'``, and for ``'retract'`` with other optimizers than SGD.

    Args:
        optimizer: Any torch optimizer. Groups come from :func:`~enc_plugin.optim.param_groups_enc`, or hold
            ``enc_projection``, ``enc_variant`` and ``enc_alpha``.

    Raises:
        TypeError: If ``optimizer`` is no torch optimizer.
        ValueError: If a group lacks a setting; if for ``'retract'`` it is unknown how the optimizer's steps depend on
            the length of gradients and weights (LBFGS); or if the optimizer of ``'rotate'`` is not SGD or AdamW.
    """
    check_projection(optimizer)
    with torch.no_grad():
        for group in _own_groups(optimizer):
            if "enc_shrink" not in group:
                _start(group, has_gradients=False)


def check_projection(optimizer: Optimizer) -> None:
    """Run the checks of :func:`add_projection` and leave the weights as they are.

    :func:`add_projection`, or else the first step, projects the weights. From this call on, groups keep their settings
    when a state with other settings is loaded, also in copies of the optimizer, pickled ones included.
    """
    check_type("optimizer", optimizer, Optimizer, "a torch optimizer")
    carry_load_hook(optimizer, _keep_settings)
    for group in _own_groups(optimizer):
        _prepare(optimizer, group)


def _groups(optimizer: Optimizer) -> list[Group]:
    return [group for group in optimizer.param_groups if group.get("enc_projection") and group["params"]]


def _own_groups(optimizer: Optimizer) -> list[Group]:
    return [group for group in _groups(optimizer) if steps_itself(optimizer, group)]


def _prepare(optimizer: Optimizer, group: Group) -> None:
    """Check a group, move its decay to ``enc_decay``, and find out how steps depend on the length of gradients."""
    if "enc_power" in group:
        return
    missing = [key for key in ("lr", "enc_variant", "enc_alpha") if key not in group]
    if missing:
        raise ValueError(f"param_groups: a group with enc_projection lacks {', '.join(missing)}")
    check_mode(group["enc_projection"])
    check_variant(group["enc_variant"])
    check_alpha(group["enc_alpha"])
    name = type(optimizer).__name__
    if group["enc_projection"] == "rotate":
        if not isinstance(optimizer, (torch.optim.SGD, torch.optim.AdamW)):
            raise ValueError(
                f"projection: 'rotate' turns weights as SGD or AdamW does in equilibrium, and {name} is neither; use "
                "one of the two, or 'retract'"
            )
        power = 2
    else:
        power = shrinking_power(optimizer, group)
        if power is None:
            raise ValueError(
                f"projection: 'retract' has to know how the length of steps depends on the length of gradients and "
                f"weights, which is unknown for {name}; use SGD or AdamW"
            )
    group.setdefault("enc_decay", group.get("weight_decay", 0.0))
    if "weight_decay" in group:
        group["weight_decay"] = 0.0
    group["enc_power"] = power


def _trained(group: Group) -> list[int]:
    return [i for i, p in enumerate(group["params"]) if p.grad is not None]


class _Projection:
    """The projection of one optimizer: its hooks, the running step, and the weights before that step."""

    def __init__(self, optimizer: Optimizer):
        self.step: RunningStep | None = None
        self.depth = 0
        self.before: list[tuple[Group, list[int], list[Tensor]]] = []
        self.copies: dict[int, list[Tensor]] = {}
        carry_load_hook(optimizer, _keep_settings)
        self.hook = optimizer.register_step_pre_hook(self.before_step).id
        # First among the post-hooks, so that the others (an average of the weights) see weights on the set.
        after = optimizer.register_step_post_hook(self.after_step).id
        optimizer._optimizer_step_post_hooks.move_to_end(after, last=False)

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Project new weights, and rescale gradients to the length for which the learning rate was chosen."""
        frame = calling_frame()
        if self.step is not None and self.step.runs(frame):  # super().step()
            self.depth += 1
            return
        self.step, self.depth, self.before = RunningStep(frame, []), 0, []
        has_closure = callable(kwargs.get("closure", args[1] if len(args) > 1 else None))
        with torch.no_grad():
            for index, group in enumerate(_own_groups(optimizer)):
                _prepare(optimizer, group)
                if "enc_shrink" not in group:
                    _start(group, not has_closure)
                self.before.append(self.look(index, group, has_closure))

    def look(self, index: int, group: Group, has_closure: bool) -> tuple[Group, list[int], list[Tensor]]:
        """Indices of the weights that the step will move, and copies of them if their steps are needed afterwards."""
        # A closure computes the gradients later.
        chosen = list(range(len(group["params"]))) if has_closure else _trained(group)
        weights = [group["params"][i] for i in chosen]
        if has_closure or group["enc_projection"] == "rotate" or group["enc_power"] != 2:
            return group, chosen, self.copy(index, weights)
        _scale([p.grad for p in weights], [group["enc_shrink"][i] ** 2 for i in chosen])
        return group, chosen, []

    def copy(self, index: int, weights: list[Tensor]) -> list[Tensor]:
        """Copies of the weights of a group. A CPU reuses the memory of the copies of the last step.

        On a CPU, new memory costs more time than the copy, because the system clears it first.
        """
        kept = self.copies.pop(index, [])
        if [_layout(x) for x in kept] != [_layout(weight) for weight in weights]:
            kept = [torch.empty_like(weight) for weight in weights]
        if kept:
            torch._foreach_copy_(kept, weights)
            if kept[0].device.type == "cpu":
                self.copies[index] = kept
        return kept

    def after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Project the weights."""
        if self.depth:
            self.depth -= 1
            return
        with torch.no_grad():
            for group, chosen, before in self.before:
                _finish(group, chosen, before)
            for group in _groups(optimizer):
                # Averages with earlier weights, as in Lookahead, leave the set.
                if not steps_itself(optimizer, group):
                    retract_(group["params"], group["enc_variant"], group["enc_alpha"])
        self.step, self.before = None, []


def _keep_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """Load hook: groups keep their own projection settings, and warn if those of the loaded state differ."""
    own, loaded = optimizer.param_groups, state["param_groups"]
    if len(own) != len(loaded):
        return None  # torch refuses it
    groups = []
    for was, found in zip(own, loaded, strict=True):
        settings, others = ({key: group.get(key) for key in PROJECTION_SETTINGS} for group in (was, found))
        if settings == others or not (was.get("enc_projection") or found.get("enc_projection")):
            groups.append(found)
            continue
        warnings.warn(
            f"ENC: projection of {len(was['params'])} tensors: the loaded state has {others['enc_projection']!r} "
            f"({others['enc_variant']}), this optimizer was made with {settings['enc_projection']!r} "
            f"({settings['enc_variant']}) and keeps that",
            stacklevel=2,
        )
        group = {key: value for key, value in found.items() if key not in (*PROJECTION_SETTINGS, *_FOUND)}
        if "enc_decay" in found:
            group["weight_decay"] = found["enc_decay"]
        groups.append(group | {key: was[key] for key in PROJECTION_SETTINGS if key in was})
    return {**state, "param_groups": groups}


def _finish(group: Group, chosen: list[int], before: list[Tensor]) -> None:
    weights, variant, alpha = [group["params"][i] for i in chosen], group["enc_variant"], group["enc_alpha"]
    if group["enc_projection"] == "rotate":
        turn_(weights, before, _angle(group), variant, alpha)
        return
    if before:  # shorten the step
        torch._foreach_sub_(weights, before)
        _scale(weights, [group["enc_shrink"][i] ** group["enc_power"] for i in chosen])
        torch._foreach_add_(weights, before)
    retract_(weights, variant, alpha)


def _layout(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _scale(tensors: list[Tensor], factors: list[float]) -> None:
    if tensors:
        torch._foreach_mul_(tensors, factors)


def _start(group: Group, has_gradients: bool) -> None:
    """Project initial weights, and store by which factor their norms changed."""
    variant, alpha = group["enc_variant"], group["enc_alpha"]
    group["enc_shrink"] = []
    for weight in group["params"]:
        lengths = _row_lengths(weight, variant)
        group["enc_shrink"].append(math.sqrt(alpha) / lengths.norm().item())
        retract_([weight], variant, alpha)
        if has_gradients and weight.grad is not None:
            # The gradient was computed at the initial weight. The shorter a row, the longer its gradient.
            factors = (lengths / _row_lengths(weight, variant)).to(weight.grad.dtype)
            rows = weight.grad.reshape(len(factors), -1) * factors[:, None]
            weight.grad.copy_(rows.reshape(weight.shape))


def _row_lengths(weight: Tensor, variant: str) -> Tensor:
    """Norms of the rows (whole-layer variants: of the layer), without their means if the variant removes those."""
    rows = weight.double().reshape(num_rows(weight, variant), -1)
    return (rows - rows.mean(1, keepdim=True) if is_centered(variant) else rows).norm(dim=1)


def _angle(group: Group) -> float | Tensor:
    if "betas" in group:
        beta = group["betas"][0]
        return equilibrium_angle(group["lr"], group["enc_decay"], beta, beta)
    keys = ("momentum", "dampening", "nesterov")
    return equilibrium_angle(group["lr"], group["enc_decay"], **{key: group[key] for key in keys})


def _see_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Step hook of all optimizers. One with projected groups gets hooks of its own, after all other pre-hooks."""
    if not _groups(optimizer):
        return
    own = vars(optimizer).get("_enc_projection")
    if own is None:
        own = optimizer._enc_projection = _Projection(optimizer)
    optimizer._optimizer_step_pre_hooks.move_to_end(own.hook)


register_optimizer_step_pre_hook(_see_step)
