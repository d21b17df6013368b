"""Parameter groups with an epsilon shift: their settings, and the groups that an optimizer steps itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import Optimizer

from ..functional.decay import check_shift_eps
from ..functional.normalizable import check_whole
from ..functional.weights import check_variant
from .running_step import steps_itself

# Keys of a group that concern its shift. 'enc_decoupled' is there only if the user passed it.
_SHIFT_SETTINGS = ("enc_variant", "shift_eps", "enc_decoupled")

_NEEDED = ("lr", "weight_decay", "enc_variant")


def check_group(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` if ``group`` has a shift, and lacks a setting that it needs or holds sharded weights."""
    if "shift_eps" not in group:
        return
    missing = [key for key in _NEEDED if key not in group]
    if missing:
        raise ValueError(
            f"param_groups: a group with shift_eps lacks {', '.join(missing)}; build groups with param_groups_enc"
        )
    check_variant(group["enc_variant"])
    check_shift_eps(group["shift_eps"], "shift_eps")
    for weight in group["params"]:
        check_whole(weight)


def shifted_groups(optimizer: Optimizer) -> list[tuple[int, dict[str, Any]]]:
    """(index, group) of each group that has a shift and that ``optimizer`` steps itself."""
    return [
        (index, group)
        for index, group in enumerate(optimizer.param_groups)
        if "shift_eps" in group and group["params"] and steps_itself(optimizer, group)
    ]


def keep_shift(
    own: list[dict[str, Any]], loaded: list[dict[str, Any]], warn: Callable[[str], None]
) -> list[dict[str, Any]] | None:
    """Groups of a loaded state with the shift of the optimizer's ``own`` groups; None: take them as they are.

    Warns of each group whose shift differs.
    """
    if len(own) != len(loaded) or not any("enc_variant" in group for group in own):
        return None
    for was, found in zip(own, loaded, strict=True):
        for name, no in (("shift_eps", "no shift"), ("enc_variant", "no variant")):
            if was.get(name) != found.get(name):
                warn(
                    f"ENC: {name} of {len(was['params'])} tensors: the loaded state has {found.get(name, no)}, "
                    f"this optimizer was made with {was.get(name, no)} and keeps that"
                )
    return [
        {key: value for key, value in found.items() if key not in _SHIFT_SETTINGS}
        | {key: was[key] for key in _SHIFT_SETTINGS if key in was}
        for was, found in zip(own, loaded, strict=True)
    ]
