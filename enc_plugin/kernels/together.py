"""Effective weights of many layers at once, in the fewest launches that the device allows."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..functional.grouped import enc_weights


def effective_weights(
    weights: Sequence[Tensor], variant: str, alphas: Sequence[float | Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Same as :func:`~enc_plugin.functional.grouped.enc_weights`, by Triton's kernels where these can compute them.

    Under ``torch.compile``, the compiler fuses torch's operations and cannot see addresses, which the kernels need.
    """
    kernels = _triton() if weights[0].is_cuda and not torch.compiler.is_compiling() else None
    table = None if kernels is None else kernels.table_of(weights, variant, dtype)
    if kernels is None or table is None:
        return enc_weights(weights, variant, alphas, dtype)
    return kernels.triton_weights(table, weights, variant, alphas, dtype)


@cache
def _triton() -> ModuleType | None:
    """The module with the kernels, or None without Triton."""
    try:
        return importlib.import_module(".triton_weights", __package__)
    except ImportError:
        return None
