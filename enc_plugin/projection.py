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

from .functional.checks import check_type
from .functional.retraction import retract_, turn_
from .functional.rotation import equilibrium_angle
from .steps.carried_hooks import carry_load_hook, register_carried_hook
from .steps.projected_groups import (
    FOUND_SETTINGS,
    PROJECTION_SETTINGS,
    Group,
    own_groups,
    prepare,
    projected_groups,
    start,
)
from .steps.running_step import (
    Decays,
    RunningStep,
    calling_frame,
    inner_optimizers,
    is_zero,
    move_pre_hook_last,
    register_first_post_hook,
    replace_decay,
    restore_decays,
    start_momentum,
    steps_itself,
)


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

    Clip gradients before the step, as usual; they are the gradients on the set. ``'retract'`` with SGD rescales them in
    place, so clear them before the next step. A weight that is pruned or parametrized afterwards is projected as a
    whole, so the part that the network computes with leaves the set (``audit`` shows by how much). Between steps, a CPU
    keeps copies of the weights for ``'rotate'``, and for ``'retract'`` with other optimizers than SGD.

    Args:
        optimizer: Any torch optimizer, also one that wraps another (look-ahead). Groups come from
            :func:`~enc_plugin.optim.param_groups_enc`, or hold ``enc_projection``, ``enc_variant`` and ``enc_alpha``.

    Raises:
        TypeError: If ``optimizer`` is no torch optimizer.
        ValueError: If a group lacks a setting; if for ``'retract'`` it is unknown how the optimizer's steps depend on
            the length of gradients and weights (LBFGS); if the optimizer of ``'rotate'`` is not SGD or AdamW; if its
            steps are differentiable or shared out among processes (ZeRO); or if a weight cannot be normalised (a row
            of zeros).
    """
    check_projection(optimizer)
    if not _start(optimizer):
        warnings.warn(
            "optimizer: no group has enc_projection, so nothing is projected; build the groups with param_groups_enc",
            stacklevel=2,
        )


def check_projection(optimizer: Optimizer) -> None:
    """Run the checks of :func:`add_projection` and leave the weights as they are.

    :func:`add_projection`, or else the first step, projects the weights. From this call on, groups keep their settings
    when a state with other settings is loaded, also in copies of the optimizer, pickled ones included.
    """
    check_type("optimizer", optimizer, Optimizer, "a torch optimizer")
    _refuse_zero(optimizer)
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, Optimizer):
            check_projection(inner)
    carry_load_hook(optimizer, _keep_settings)
    for group in own_groups(optimizer):
        prepare(optimizer, group)


def _start(optimizer: Optimizer) -> bool:
    """Project the weights of ``optimizer`` and of those that it wraps; False if none of them has projected groups."""
    found = [_start(inner) for inner in inner_optimizers(optimizer) if isinstance(inner, Optimizer)]
    with torch.no_grad():
        start(own_groups(optimizer), has_gradients=False)
    return any(found) or bool(projected_groups(optimizer))


def _refuse_zero(optimizer: Optimizer) -> None:
    if is_zero(optimizer) and projected_groups(optimizer):
        raise ValueError(
            "projection: ZeroRedundancyOptimizer steps a share of the weights in each process, and the initial norms "
            "that the steps need would be lost in its state dict; use the optimizer that it wraps, or ENC layers"
        )


def _trained(group: Group) -> list[int]:
    return [i for i, p in enumerate(group["params"]) if p.grad is not None]


class _Projection:
    """The projection of one optimizer: its hooks, the running step, and the weights before that step."""

    def __init__(self, optimizer: Optimizer):
        _refuse_zero(optimizer)
        self.step: RunningStep | None = None
        self.depth = 0
        self.before: list[tuple[Group, list[int], list[Tensor]]] = []
        self.copies: dict[int, list[Tensor]] = {}
        self.decays: Decays = []
        carry_load_hook(optimizer, _keep_settings)
        self.hook = optimizer.register_step_pre_hook(self.before_step).id
        register_first_post_hook(optimizer, self.after_step)
        optimizer.register_state_dict_pre_hook(self.restore)

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Project new weights, and rescale gradients to the length for which the learning rate was chosen."""
        frame = calling_frame()
        if self.step is not None and self.step.runs(frame):  # super().step()
            self.depth += 1
            return
        start_momentum(optimizer)
        self.restore(optimizer)
        self.step, self.depth, self.before = RunningStep(frame, []), 0, []
        has_closure = callable(kwargs.get("closure", args[1] if len(args) > 1 else None))
        groups = own_groups(optimizer)
        for group in groups:
            prepare(optimizer, group)
        with torch.no_grad():
            start(groups, not has_closure)
            for index, group in enumerate(groups):
                self.before.append(self.look(index, group, has_closure))
                if "weight_decay" in group:
                    replace_decay(group, group["enc_no_decay"], self.decays)

    def restore(self, optimizer: Optimizer) -> None:
        """Restore ``weight_decay`` of the groups, also after a step that raised an error."""
        restore_decays(self.decays)

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
        self.restore(optimizer)
        with torch.no_grad():
            for group, chosen, before in self.before:
                _finish(group, chosen, before)
            _retract_inner(optimizer)  # averages with earlier weights, as in Lookahead, leave the set
        self.step, self.before = None, []


def _restore(optimizer: Optimizer) -> None:
    projection = vars(optimizer).get("_enc_projection")
    if projection is not None:
        projection.restore(optimizer)


def _retract_inner(optimizer: Optimizer) -> None:
    """Project the weights of the groups that an inner optimizer steps."""
    for group in projected_groups(optimizer):
        if not steps_itself(optimizer, group):
            retract_(group["params"], group["enc_variant"], group["enc_alpha"])


def _keep_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """Load hook: groups keep their own projection settings, and warn if those of the loaded state differ."""
    own, loaded = optimizer.param_groups, state["param_groups"]
    if len(own) != len(loaded):
        return None  # torch refuses it
    groups, entries = [], dict(state["state"])
    for was, found in zip(own, loaded, strict=True):
        if "enc_decay" in found:  # version 0.1.0 moved the decay there
            found = {**found, "weight_decay": found["enc_decay"]}
        settings, others = ({key: group.get(key) for key in PROJECTION_SETTINGS} for group in (was, found))
        if settings == others or not (was.get("enc_projection") or found.get("enc_projection")):
            groups.append(found)
            continue
        warnings.warn(
            f"ENC: projection of {len(was['params'])} tensors: the loaded state has {others['enc_projection']!r} "
            f"({others['enc_variant']}), this optimizer was made with {settings['enc_projection']!r} "
            f"({settings['enc_variant']}) and keeps that; their momentum starts anew",
            stacklevel=2,
        )
        group = {key: value for key, value in found.items() if key not in (*PROJECTION_SETTINGS, *FOUND_SETTINGS)}
        group |= {key: was[key] for key in PROJECTION_SETTINGS if key in was}
        if "enc_shrink" in found and was.get("enc_projection"):
            grows = math.sqrt(was["enc_alpha"] / found["enc_alpha"])
            group["enc_shrink"] = [shrink * grows for shrink in found["enc_shrink"]]
        groups.append(group)
        for index in found["params"]:
            entries.pop(index, None)  # moments of gradients of another length
    return {**state, "param_groups": groups, "state": entries}


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


def _angle(group: Group) -> float | Tensor:
    if "betas" in group:
        beta = group["betas"][0]
        return equilibrium_angle(group["lr"], group.get("weight_decay", 0.0), beta, beta)
    keys = ("momentum", "dampening", "nesterov")
    return equilibrium_angle(group["lr"], group.get("weight_decay", 0.0), **{key: group[key] for key in keys})


def _see_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Step hook of all optimizers. One with projected groups gets hooks of its own, after all other pre-hooks."""
    if not projected_groups(optimizer):
        return
    own = vars(optimizer).get("_enc_projection")
    if own is None:
        own = vars(optimizer)["_enc_projection"] = _Projection(optimizer)
    move_pre_hook_last(optimizer, own.hook)


register_carried_hook(_keep_settings, _restore)
register_optimizer_step_pre_hook(_see_step)
