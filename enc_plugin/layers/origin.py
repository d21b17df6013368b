"""The settings of ENC layers in checkpoints: writing, reading and comparing them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Literal, TypedDict

import torch
from torch import Tensor


class Settings(TypedDict, total=False):
    """Settings of an ENC layer, as its constructor takes them; empty for a plain layer."""

    variant: str
    alpha: float | Literal["learnable"]
    post_norm: bool


# Key of a layer's settings in state dicts, after the layer's name; torch uses it for the result of get_extra_state.
KEY = "_extra_state"

# Settings of an ENC layer whose entry cannot be read or was removed from the checkpoint. They differ from all others.
UNKNOWN: Settings = {"variant": "unknown"}


class CheckpointWarning(UserWarning):
    """A checkpoint was saved with other ENC settings than those of the layers that load it, or holds two networks."""


def write_settings(settings: Settings) -> Tensor:
    """``settings`` as JSON, encoded as a tensor of bytes.

    It is a tensor because safetensors stores nothing else, and int32 so that sums of checkpoints do not overflow.
    """
    return torch.frombuffer(bytearray(json.dumps(settings), "ascii"), dtype=torch.uint8).int()


def read_settings(entry: Tensor) -> Settings:
    """Inverse of :func:`write_settings`; also reads its result after a cast or after averaging equal checkpoints."""
    try:
        settings: Settings = json.loads(bytes(map(round, entry.tolist())))
        return settings if "variant" in settings else UNKNOWN
    # Raised if the entry is of another kind of module, or is on the meta device.
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return UNKNOWN


def saved_settings(state_dict: Mapping[str, Tensor]) -> dict[str, Settings]:
    """Settings of the ENC layers in a checkpoint, by layer name; empty for a plain network.

    Args:
        state_dict: State dict, or any mapping with its keys.
    """
    found = {key: read_settings(value) for key, value in state_dict.items() if key.split(".")[-1] == KEY}
    return {
        key.removesuffix(KEY).removesuffix(".").removeprefix("module."): settings
        for key, settings in found.items()
        if settings != UNKNOWN
    }


def differing_settings(saved: Settings, own: Settings) -> list[str]:
    """Names of the settings that make layers with equal weights give different outputs."""
    # A learnable alpha is set to the value in the checkpoint.
    return [
        key
        for key, value in saved.items()
        if value != own.get(key) and not (key == "alpha" and own["alpha"] == "learnable")
    ]


def settings_text(settings: Mapping[str, object], keys: Iterable[str] | None = None) -> str:
    """Settings as in code, such as ``variant='ws', alpha=1.0``; ``keys`` selects some of them."""
    return ", ".join(f"{key}={settings.get(key)!r}" for key in (settings if keys is None else keys))


def warn_of_origin(saved: Settings, own: Settings, keeps_function: bool) -> None:
    """Warn if a checkpoint was saved with other settings.

    The text does not name the layer, so Python shows it once for all layers with the same settings.
    """
    if not saved and not keeps_function:
        warnings.warn(
            "the checkpoint is of a plain network: ENC layers normalise its weights, so the outputs differ until the "
            "network is trained; to keep the outputs, use to_enc(model, preserve=True), or enc=dict(preserve=True) in "
            "a config",
            CheckpointWarning,
            stacklevel=4,
        )
    differ = differing_settings(saved, own)
    if differ:
        warnings.warn(
            f"the checkpoint is of an ENC network with {settings_text(saved, differ)}, this one has "
            f"{settings_text(own, differ)}: the free weights load, but the outputs differ",
            CheckpointWarning,
            stacklevel=4,
        )
