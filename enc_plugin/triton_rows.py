"""Triton kernels for the variants ``'wn'`` and ``'ws'`` (eq. 21 and 22), for all weights of a network in one launch.

The kernels read a table with the addresses and lengths of all rows. On a fast GPU a training step takes as long as the
host needs to launch it, so the table also keeps what Python would otherwise ask each weight for in each step. Importing
this module needs Triton.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functional import grouped
from .functional.weights import is_centered

_BLOCK = 1024  # elements of a row per load


@triton.jit
def _forward(rows, lengths, offsets, scales, out, means, inverses, CENTERED: tl.constexpr, BLOCK: tl.constexpr):
    """Row j: ``scale (x - mean) / std`` if CENTERED, else ``scale x / norm``."""
    r = tl.program_id(0)
    x_ptr = tl.load(rows + r).to(tl.pointer_type(tl.float32))
    n = tl.load(lengths + r)
    out += tl.load(offsets + r)
    mean = 0.0
    if CENTERED:
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, n, BLOCK):
            i = k + tl.arange(0, BLOCK)
            total += tl.load(x_ptr + i, mask=i < n, other=0.0)
        mean = tl.sum(total, 0) / n
    square = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, n, BLOCK):  # this pass and the next read the row from the cache
        i = k + tl.arange(0, BLOCK)
        d = tl.where(i < n, tl.load(x_ptr + i, mask=i < n, other=0.0) - mean, 0.0)
        square += d * d
    square = tl.sum(square, 0)
    if CENTERED:
        square = square / n
    inverse = 1.0 / tl.sqrt(square)
    factor = tl.load(scales + r) * inverse
    for k in range(0, n, BLOCK):
        i = k + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0)
        tl.store(out + i, ((x - mean) * factor).to(out.dtype.element_ty), mask=i < n)
    tl.store(means + r, mean)
    tl.store(inverses + r, inverse)


@triton.jit
def _backward(
    rows, lengths, offsets, scales, grads, means, inverses, out, d_scales, CENTERED: tl.constexpr, BLOCK: tl.constexpr
):
    r = tl.program_id(0)
    x_ptr = tl.load(rows + r).to(tl.pointer_type(tl.float32))
    n = tl.load(lengths + r)
    offset = tl.load(offsets + r)
    grads += offset
    out += offset
    mean, inverse = tl.load(means + r), tl.load(inverses + r)
    sum_g = tl.zeros((BLOCK,), tl.float32)
    sum_gx = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, n, BLOCK):
        i = k + tl.arange(0, BLOCK)
        g = tl.load(grads + i, mask=i < n, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += g * (tl.load(x_ptr + i, mask=i < n, other=0.0) - mean)
    dot = tl.sum(sum_gx, 0) * inverse
    slope = dot * inverse
    mean_g = 0.0
    if CENTERED:
        slope = slope / n
        mean_g = tl.sum(sum_g, 0) / n
    factor = tl.load(scales + r) * inverse
    for k in range(0, n, BLOCK):
        i = k + tl.arange(0, BLOCK)
        g = tl.load(grads + i, mask=i < n, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0)
        tl.store(out + i, factor * (g - mean_g - (x - mean) * slope), mask=i < n)
    tl.store(d_scales + r, dot)


class RowTable:
    """Where the rows of some weights lie, for the kernels, and the shapes of the weights, for views of the results."""

    def __init__(self, weights: Sequence[Tensor]):
        shapes = [grouped.matrix_shape(weight) for weight in weights]
        starts = [torch.arange(m) * n for m, n in shapes]
        sizes = torch.tensor([weight.numel() for weight in weights])
        firsts = (sizes.cumsum(0) - sizes).tolist()
        self.size = int(sizes.sum())
        self.places = [weight.data_ptr() for weight in weights]
        addresses = [place + weights[0].element_size() * s for place, s in zip(self.places, starts, strict=True)]
        device = weights[0].device
        self.addresses = torch.cat(addresses).to(device)
        self.offsets = torch.cat([first + s for first, s in zip(firsts, starts, strict=True)]).to(device)
        self.lengths = torch.cat([torch.full((m,), n, dtype=torch.int32) for m, n in shapes]).to(device)
        self._views = [(weight.shape, weight.stride(), first) for weight, first in zip(weights, firsts, strict=True)]
        self._scales: dict[tuple, Tensor] = {}

    def split(self, elements: Tensor) -> list[Tensor]:
        """Views of the concatenated rows of all weights, each with the shape and strides of its weight."""
        return [elements.as_strided(*view) for view in self._views]

    def scales(self, weights: Sequence[Tensor], variant: str, alphas: Sequence[float | Tensor]) -> Tensor:
        """:func:`enc_plugin.functional.grouped.factors` of the weights; kept if no alpha is learnable."""
        key = (variant, *alphas)
        if key in self._scales:
            return self._scales[key]
        found = grouped.factors(weights, variant, alphas)
        if not any(isinstance(alpha, Tensor) for alpha in alphas) and not _is_captured(found.device):
            self._scales[key] = found
        return found


_tables: dict[tuple, RowTable] = {}


def table_of(weights: Sequence[Tensor], variant: str, dtype: torch.dtype) -> RowTable | None:
    """The table that :func:`triton_weights` needs, or None if the kernels cannot compute these weights.

    Tables are kept, because parameters usually stay where they are. The first call for a device, variant and dtype
    compares the kernels with torch's operations, which waits for the device. If they fail or differ by more than
    rounding, it warns, and torch's operations are used from then on.

    Args:
        weights: Free weights of one device and dtype.
        variant: Variant of all weights.
        dtype: Dtype of the effective weights.
    """
    if variant not in ("wn", "ws") or weights[0].dtype != torch.float32 or dtype not in _DTYPES:
        return None
    device = weights[0].device
    kind, key = (device, variant, dtype), (device, *((w.data_ptr(), w.shape, w.stride()) for w in weights))
    table = _tables.get(key)
    if table is None or kind not in _is_right:
        # Neither copies from the host nor waits are allowed during capture.
        if _is_captured(device) or not all(map(grouped.has_whole_rows, weights)):
            return None
        if kind not in _is_right:
            _is_right[kind] = _trial(*kind)
    if not _is_right[kind]:
        return None
    if table is None:
        if len(_tables) >= 64:  # tables of weights that are new in each pass, or of deleted networks
            _tables.clear()
        table = _tables[key] = RowTable(weights)
    return table


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _computed(
    table: RowTable, variant: str, dtype: torch.dtype, scale: Tensor
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """The effective weights without autograd, and the statistics for the backward pass."""
    what = torch.empty(table.size, dtype=dtype, device=scale.device)
    means, inverses = torch.empty_like(scale), torch.empty_like(scale)
    with torch.cuda.device_of(scale):
        _forward[(len(scale),)](
            table.addresses, table.lengths, table.offsets, scale, what, means, inverses,
            CENTERED=is_centered(variant), BLOCK=_BLOCK,
        )  # fmt: skip
    return table.split(what), (means, inverses)


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, table: RowTable, variant: str, dtype: torch.dtype, scale: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        whats, stats = _computed(table, variant, dtype, scale)
        grouped.keep_for_backward(ctx, variant, scale, weights, stats)
        ctx.table, ctx.dtype = table, dtype
        return tuple(whats)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        table, scale = ctx.table, ctx.scale
        # The table has the old addresses of weights that have moved, so compute those gradients with torch.
        is_moved = [weight.data_ptr() for weight in ctx.weights] != table.places
        if grouped.needs_own_gradients(ctx, grads) or is_moved:
            return None, None, None, *grouped.own_gradients(ctx, grads)
        elements = [
            torch.zeros(weight.numel(), dtype=ctx.dtype, device=weight.device)
            if grad is None
            else grouped.in_order_of(weight, grad).as_strided((grad.numel(),), (1,))
            for weight, grad in zip(ctx.weights, grads, strict=True)
        ]
        d_x, d_scale = torch.empty(table.size, device=scale.device), torch.empty_like(scale)
        with torch.cuda.device_of(scale):
            _backward[(len(scale),)](
                table.addresses, table.lengths, table.offsets, scale, torch.cat(elements), *ctx.stats, d_x, d_scale,
                CENTERED=is_centered(ctx.variant), BLOCK=_BLOCK,
            )  # fmt: skip
        d_weights = (None if grad is None else d for grad, d in zip(grads, table.split(d_x), strict=True))
        return None, None, None, d_scale if ctx.needs_input_grad[3] else None, *d_weights


def triton_weights(
    table: RowTable, weights: Sequence[Tensor], variant: str, alphas: Sequence[float | Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Same as :func:`enc_plugin.functional.grouped.enc_weights`, for the weights of ``table`` (:func:`table_of`)."""
    scale = table.scales(weights, variant, alphas)
    if not torch.is_grad_enabled():
        return _computed(table, variant, dtype, scale)[0]
    return list(_AllRows.apply(table, variant, dtype, scale, *weights))


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_is_right: dict[tuple[torch.device, str, torch.dtype], bool] = {}


def _trial(device: torch.device, variant: str, dtype: torch.dtype) -> bool:
    """Whether the kernels give the weights and gradients that torch's operations give."""
    problem = None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            # Rows within a block, and of several. The gradients vary within a row, so that none vanishes.
            shapes = [(3, 5), (2, 2 * _BLOCK + 1), (4, 3, 3, 3)]
            weights = [_waves(shape, device, 0.7).add_(0.1).requires_grad_() for shape in shapes]
            table, alphas = RowTable(weights), [1.0] * len(weights)
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
    return torch.arange(math.prod(shape), device=device).mul(step).sin().reshape(shape)


def _outputs_and_gradients(whats: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    directions = [_waves(tuple(what.shape), what.device, 1.3).to(what.dtype) for what in whats]
    gradients = torch.autograd.grad(whats, weights, directions)
    return [x.detach().float() for x in (*whats, *gradients)]
