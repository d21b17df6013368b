"""The weights of a network by Triton's kernels: autograd, tables of weights, and a trial of the kernels.

On a fast GPU, a training step takes as long as the host needs to launch it. Importing this module needs Triton.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional import grouped
from ..functional.weights import is_whole_layer
from .triton_layers import LayerTable
from .triton_rows import RowTable
from .triton_table import Table

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_tables: dict[tuple, Table] = {}
_is_right: dict[tuple[torch.device, str, torch.dtype], bool] = {}


def table_of(weights: Sequence[Tensor], variant: str, dtype: torch.dtype) -> Table | None:
    """The table that :func:`triton_weights` needs, or None if the kernels cannot compute these weights.

    Tables are kept, because parameters usually stay where they are. The first call for a device, variant and dtype
    compares the kernels with torch's operations, which waits for the device. If they fail or differ by more than
    rounding, it warns, and torch's operations are used from then on.

    Args:
        weights: Free weights of one device and dtype.
        variant: Variant of all weights.
        dtype: Dtype of the effective weights.
    """
    if variant not in grouped.GROUPED or weights[0].dtype != torch.float32 or dtype not in _DTYPES:
        return None
    if not {*map(type, weights)} <= {Tensor, nn.Parameter}:
        return None  # a subclass may keep its values elsewhere
    device, make = weights[0].device, _table_class(variant)
    kind, key = (device, variant, dtype), (make, device, *[(w.data_ptr(), w.shape, w.stride()) for w in weights])
    table = _tables.get(key)
    if table is None or kind not in _is_right:
        # Making a table copies from the host, and a trial waits for the device.
        if grouped.is_recorded(device) or not all(map(grouped.has_whole_rows, weights)):
            return None
        if kind not in _is_right:
            _is_right[kind] = _trial(*kind)
    if not _is_right[kind]:
        return None
    if table is None:
        if len(_tables) >= 64:  # tables of weights that are new in each pass, or of deleted networks
            _tables.clear()
        table = _tables[key] = make(weights)
    return table


def _table_class(variant: str) -> type[Table]:
    return LayerTable if is_whole_layer(variant) else RowTable


class _AllWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, table: Table, variant: str, dtype: torch.dtype, scale: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        whats, stats = table.computed(variant, dtype, scale)
        grouped.keep_for_backward(ctx, variant, scale, weights, stats)
        ctx.table, ctx.dtype = table, dtype
        return tuple(whats)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # The table has the old addresses of weights that have moved, so compute those gradients with torch.
        is_moved = [weight.data_ptr() for weight in ctx.weights] != ctx.table.places
        if grouped.needs_own_gradients(ctx, grads) or is_moved:
            return None, None, None, *grouped.own_gradients(ctx, grads)
        elements = [
            torch.zeros(weight.numel(), dtype=ctx.dtype, device=weight.device)
            if grad is None
            else grouped.in_order_of(weight, grad).as_strided((grad.numel(),), (1,))
            for weight, grad in zip(ctx.weights, grads, strict=True)
        ]
        d_x, d_scale = ctx.table.pulled_back(ctx.variant, ctx.scale, ctx.stats, torch.cat(elements))
        d_weights = (None if grad is None else d for grad, d in zip(grads, ctx.table.split(d_x), strict=True))
        return None, None, None, d_scale if ctx.needs_input_grad[3] else None, *d_weights


def triton_weights(
    table: Table, weights: Sequence[Tensor], variant: str, alphas: Sequence[float | Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Same as :func:`enc_plugin.functional.grouped.enc_weights`, for the weights of ``table`` (:func:`table_of`)."""
    scale = table.scales(weights, variant, alphas)
    if not torch.is_grad_enabled():
        return table.computed(variant, dtype, scale)[0]
    return list(_AllWeights.apply(table, variant, dtype, scale, *weights))


def _trial(device: torch.device, variant: str, dtype: torch.dtype) -> bool:
    """Whether the kernels give the weights and gradients that torch's operations give."""
    problem = None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            # Less and more than a program loads at once. The gradients vary within a row, so that none vanishes.
            shapes = [(3, 5), (4, 2500), (4, 3, 3, 3)]
            weights = [_waves(shape, device, 0.7).add_(0.1).requires_grad_() for shape in shapes]
            table, alphas = _table_class(variant)(weights), [1.0] * len(weights)
            found, expected = (
                _outputs_and_gradients(whats, weights)
                for whats in (
                    triton_weights(table, weights, variant, alphas, dtype),
                    grouped.enc_weights(weights, variant, alphas, dtype),
                )
            )
            errors = [(x - y).norm() / y.norm() for x, y in zip(found, expected, strict=True)]
            error = torch.stack(errors).max().item()
        if not error <= 2 * torch.finfo(dtype).eps + 1e-5:  # NaN too
            problem = f"their results differ from torch's by a relative {error:.1e}"
    except Exception as failure:  # a missing compiler, a device that is too old, ...
        problem = f"{type(failure).__name__}: {failure}"
    if problem is not None:
        warnings.warn(
            f"ENC: the Triton kernels for ENC weights are not used on {device} ({problem}); torch's operations are "
            "used instead, which need more launches",
            stacklevel=2,
        )
    return problem is None


def _waves(shape: tuple[int, ...], device: torch.device, step: float) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32, device=device).mul(step).sin().reshape(shape)


def _outputs_and_gradients(whats: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    directions = [_waves(tuple(what.shape), what.device, 1.3).to(what.dtype) for what in whats]
    gradients = torch.autograd.grad(whats, weights, directions)
    return [x.detach().float() for x in (*whats, *gradients)]
