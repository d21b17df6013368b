"""Parameter groups that carry the epsilon shift: what they say of it, and which of them an optimizer steps itself."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import Optimizer

from .functional.decay import check_shift_eps
from .functional.weights import check_variant
from .running_step import steps_itself

# What a group knows of its shift; 'enc_decoupled' is there only if the user said it.
SHIFT_SETTINGS = ("enc_variant", "shift_eps", "enc_decoupled")

_NEEDED = ("lr", "weight_decay", "enc_variant")


def check_group(group: dict[str, Any]) -> None:
    """Raise unless a group that carries the shift has all that it needs."""
    if "shift_eps" not in group:
        return
    missing = [key for key in _NEEDED if key not in group]
    if missing:
        raise ValueError(
            f"param_groups: a group with shift_eps lacks {', '.join(missing)}; take groups from param_groups_enc"
        )
    check_variant(group["enc_variant"])
    check_shift_eps(group["shift_eps"], "shift_eps")


def shifted_groups(optimizer: Optimizer) -> list[tuple[int, dict[str, Any]]]:
    """Groups that carry the shift and that ``optimizer`` steps itself, with their indices."""
    return [
        (index, group)
        for index, group in enumerate(optimizer.param_groups)
        if "shift_eps" in group and group["params"] and steps_itself(optimizer, group)
    ]
