"""Checkpoints of mmengine under ``torch.load(weights_only=True)``, the default since torch 2.6."""

from __future__ import annotations

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_STATISTICS = ("min", "max", "mean", "current")


def _history_statistic(owner: type, name: str):
    """Stand-in for ``getattr`` in checkpoints: HistoryBuffer pickles its own statistics by name, nothing else may."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(owner, name)
    raise ValueError(
        f"checkpoint: it asks for attribute {name!r} of {owner!r}, which no mmengine checkpoint needs; "
        "load it only if you trust its source, with torch.load(..., weights_only=False)"
    )


def allow_mmengine_checkpoints() -> None:
    """Let ``weights_only`` loading read what mmengine's checkpoints hold besides tensors: log histories.

    Only these types are admitted, so ``--resume``, ``load_from``, ``test.py`` and ``get_model(pretrained=...)`` work
    while files with other code in them stay refused.
    """
    arrays = np._core if hasattr(np, "_core") else np.core  # numpy 2 and 1
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            arrays.multiarray._reconstruct,
            arrays.multiarray.scalar,
            np.dtypes.Float64DType,
            np.dtypes.Int64DType,
            (_history_statistic, "builtins.getattr"),
        ]
    )
