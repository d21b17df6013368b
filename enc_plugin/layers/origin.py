"""What a checkpoint says of its ENC layers: their settings, written beside the tensors of each layer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Literal, TypedDict

import torch
from torch import Tensor


class Settings(TypedDict, total=False):
    """Settings of an ENC layer, as its constructor takes them; empty for a plain layer."""

    variant: str
    alpha: float | Literal["learnable"]
    post_norm: bool


# The key of a layer's settings in state dicts, behind the layer's name: the one that torch has for what is no tensor.
KEY = "_extra_state"

# Of an ENC layer whose entry cannot be read, or was taken out of the checkpoint: they fit no layer.
UNKNOWN: Settings = {"variant": "unknown"}


class CheckpointWarning(UserWarning):
    """A checkpoint was saved under other settings than those of the layers that load it."""


def write_settings(settings: Settings) -> Tensor:
    """``settings`` as the bytes of a JSON text.

    A tensor, because safetensors takes nothing else; int32, so that sums of checkpoints do not overflow.
    """
    return torch.frombuffer(bytearray(json.dumps(settings), "ascii"), dtype=torch.uint8).int()


def read_settings(entry: Tensor) -> Settings:
    """The settings that :func:`write_settings` wrote, also from a cast or an average of its result."""
    try:
        settings: Settings = json.loads(bytes(map(round, entry.tolist())))
        return settings if "variant" in settings else UNKNOWN
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):  # another module's, or on meta
        return UNKNOWN


def saved_settings(state_dict: Mapping[str, Tensor]) -> dict[str, Settings]:
    """What the ENC layers of a checkpoint were, by the layers' names in it; empty for a plain network.

    Args:
        state_dict: As of :meth:`torch.nn.Module.state_dict`, or any mapping with its keys.
    """
    found = {key: read_settings(value) for key, value in state_dict.items() if key.split(".")[-1] == KEY}
    return {
        key.removesuffix(KEY).removesuffix(".").removeprefix("module."): settings
        for key, settings in found.items()
        if settings != UNKNOWN
    }


def differing_settings(saved: Settings, own: Settings) -> list[str]:
    """Names of the settings by which layers with equal weights compute something else."""
    # A learnable alpha takes up any value.
    return [
        key
        for key, value in saved.items()
        if value != own.get(key) and not (key == "alpha" and own["alpha"] == "learnable")
    ]


def warn_of_origin(saved: Settings, own: Settings, keeps_function: bool) -> None:
    """Warn if a checkpoint comes from other settings; one text for all layers, so that Python shows it once."""
    if not saved and not keeps_function:
        warnings.warn(
            "the checkpoint is of a plain network: ENC layers normalise its weights, so the outputs differ until "
            "the network is trained; to_enc(model, preserve=True) keeps them, enc=dict(preserve=True) in a config",
            CheckpointWarning,
            stacklevel=3,
        )
    differ = differing_settings(saved, own)
    if differ:
        warnings.warn(
            "the checkpoint is of an ENC network with "
            + ", ".join(f"{key}={saved.get(key)!r}" for key in differ)
            + ", this one has "
            + ", ".join(f"{key}={own.get(key)!r}" for key in differ)
            + ": the free weights load, but the outputs differ",
            CheckpointWarning,
            stacklevel=3,
        )
