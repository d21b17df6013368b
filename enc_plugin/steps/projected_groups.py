"""Parameter groups that are projected: their settings, and what an optimizer has to know before it steps them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..functional.normalizable import check_whole
from ..functional.retraction import retract_
from ..functional.weights import check_alpha, check_variant, enc_weight, imprecise_rows, is_centered, num_rows
from .decay_kinds import shrinking_power
from .running_step import steps_itself

MODES = {
    "retract": "the optimizer's own step, then a projection onto the constraint set",
    "rotate": "a rotation in the direction of the optimizer's step, by the angle of plain training in equilibrium",
}

# Settings of a group, and what the first step adds to them.
PROJECTION_SETTINGS = ("enc_projection", "enc_variant", "enc_alpha")
FOUND_SETTINGS = ("enc_stepped_by", "enc_power", "enc_no_decay", "enc_shrink")

Group = dict[str, Any]


def check_mode(mode: str) -> None:
    """Raise ``ValueError`` unless ``mode`` is ``'retract'`` or ``'rotate'``."""
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"projection: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")


def projected_groups(optimizer: Optimizer) -> list[Group]:
    """The groups of an optimizer that ask for the projection."""
    return [group for group in optimizer.param_groups if group.get("enc_projection") and group["params"]]


def own_groups(optimizer: Optimizer) -> list[Group]:
    """Those of them that the optimizer steps itself, instead of leaving that to an optimizer that it wraps."""
    return [group for group in projected_groups(optimizer) if steps_itself(optimizer, group)]


@torch._disable_dynamo  # type: ignore[attr-defined]  # as in torch.optim: trial steps must not be compiled
def prepare(optimizer: Optimizer, group: Group) -> None:
    """Check a group, and find out how the optimizer's steps depend on the length of gradients and weights."""
    name = type(optimizer).__name__
    if group.get("enc_stepped_by") == name:  # else groups may come from an optimizer of another kind
        return
    missing = [key for key in ("lr", "enc_variant", "enc_alpha") if key not in group]
    if missing:
        raise ValueError(f"param_groups: a group with enc_projection lacks {', '.join(missing)}")
    check_mode(group["enc_projection"])
    check_variant(group["enc_variant"])
    check_alpha(group["enc_alpha"])
    for weight in group["params"]:
        check_whole(weight)
    if group.get("differentiable"):
        raise ValueError(
            "differentiable: the projection of a step passes no gradient on; use differentiable=False, or ENC layers"
        )
    if group["enc_projection"] == "rotate":
        if not isinstance(optimizer, (torch.optim.SGD, torch.optim.AdamW)):
            raise ValueError(
                f"projection: 'rotate' turns weights as SGD or AdamW does in equilibrium, and {name} is neither; use "
                "one of the two, or 'retract'"
            )
        group.update(enc_power=2, enc_no_decay=0.0)
    else:
        power, no_decay = shrinking_power(optimizer, group)
        if power is None:
            raise ValueError(
                f"projection: 'retract' has to know how the length of steps depends on the length of gradients and "
                f"weights, which is unknown for {name}; use SGD or AdamW"
            )
        group.update(enc_power=power, enc_no_decay=no_decay)
    group["enc_stepped_by"] = name


def start(groups: list[Group], has_gradients: bool) -> None:
    """Project the weights of new groups, and store by which factor their norms changed."""
    for group in groups:
        if "enc_shrink" in group and len(group["enc_shrink"]) != len(group["params"]):
            raise ValueError(
                f"param_groups: a projected group has {len(group['params'])} weights, and it had "
                f"{len(group['enc_shrink'])} at its first step; add weights by add_param_group, and freeze them by "
                "requires_grad_(False) instead of removing them"
            )
    groups = [group for group in groups if "enc_shrink" not in group]
    for group in groups:
        for weight in group["params"]:
            _check_start(weight.detach(), weight.requires_grad, group["enc_variant"], group["enc_alpha"])
    for group in groups:
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
        needs_norms = group["enc_projection"] == "retract" and group["enc_power"]
        if needs_norms and all(abs(shrink - 1) < 1e-4 for shrink in group["enc_shrink"]):
            warnings.warn(
                f"ENC: {len(group['params'])} projected weights have squared norm {alpha:g} from the start, as if they "
                "came from a projected network. 'retract' then takes the learning rate as one for a plain network of "
                "this small norm, so that steps turn the weights further. Load the state of that network's optimizer "
                "too, or use 'rotate', which does not depend on initial norms",
                stacklevel=2,
            )


def _check_start(weight: Tensor, is_trained: bool, variant: str, alpha: float) -> None:
    bad = imprecise_rows(weight, variant)
    if bad.any():
        raise ValueError(
            f"params: {int(bad.sum())} of {len(bad)} rows of a projected weight of shape {tuple(weight.shape)} are "
            f"zero, constant or not finite, and {variant!r} cannot normalise them; initialise them with random values, "
            "or leave the layer out (to_enc with exclude=[...])"
        )
    if not is_trained and (enc_weight(weight, variant, alpha) - weight).norm() > 1e-4 * math.sqrt(alpha):
        raise ValueError(
            f"params: a projected weight of shape {tuple(weight.shape)} is frozen and off the constraint set. To "
            "project it would change what frozen layers compute, because batch norms in eval mode keep their "
            "statistics; leave frozen layers out (to_enc with exclude=[...]), or freeze them after add_projection"
        )


def _row_lengths(weight: Tensor, variant: str) -> Tensor:
    """Norms of the rows (whole-layer variants: of the layer), without their means if the variant removes those."""
    rows = weight.double().reshape(num_rows(weight, variant), -1)
    return (rows - rows.mean(1, keepdim=True) if is_centered(variant) else rows).norm(dim=1)
