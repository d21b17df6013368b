"""Triton kernels for the variants ``'wn'`` and ``'ws'`` (eq. 21 and 22), for all weights of a network in one launch.

The kernels read a table with the addresses and lengths of all rows. Importing this module needs Triton.
"""

from __future__ import annotations

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


class _Rows:
    """Table of the rows of some weights: addresses, lengths, and offsets in the common output."""

    def __init__(self, weights: Sequence[Tensor]):
        shapes = [grouped.matrix_shape(weight) for weight in weights]
        starts = [torch.arange(m) * n for m, n in shapes]
        sizes = torch.tensor([weight.numel() for weight in weights])
        firsts = (sizes.cumsum(0) - sizes).tolist()
        self.size = int(sizes.sum())
        device = weights[0].device
        addresses = [weight.data_ptr() + weight.element_size() * s for weight, s in zip(weights, starts, strict=True)]
        self.addresses = torch.cat(addresses).to(device)
        self.offsets = torch.cat([first + s for first, s in zip(firsts, starts, strict=True)]).to(device)
        self.lengths = torch.cat([torch.full((m,), n, dtype=torch.int32) for m, n in shapes]).to(device)


_tables: dict[tuple, _Rows] = {}


def _key(weights: Sequence[Tensor]) -> tuple:
    return weights[0].device, *((weight.data_ptr(), *grouped.matrix_shape(weight)) for weight in weights)


def _rows(weights: Sequence[Tensor]) -> _Rows:
    """The table of ``weights``; cached, because parameters usually keep their addresses."""
    key = _key(weights)
    if key not in _tables:
        if len(_tables) >= 64:  # tables of weights that are new in each pass, or of deleted networks
            _tables.clear()
        _tables[key] = _Rows(weights)
    return _tables[key]


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, variant: str, dtype: torch.dtype, scale: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        rows = _rows(weights)
        what = torch.empty(rows.size, dtype=dtype, device=scale.device)
        means, inverses = torch.empty_like(scale), torch.empty_like(scale)
        with torch.cuda.device_of(scale):
            _forward[(len(scale),)](
                rows.addresses, rows.lengths, rows.offsets, scale, what, means, inverses,
                CENTERED=is_centered(variant), BLOCK=_BLOCK,
            )  # fmt: skip
        grouped.keep_for_backward(ctx, variant, scale, weights, (means, inverses))
        ctx.dtype, ctx.places = dtype, [weight.data_ptr() for weight in weights]
        return tuple(grouped.in_layouts_of(weights, what))

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # The table has the old addresses of weights that have moved, so compute those gradients with torch.
        is_moved = any(weight.data_ptr() != place for weight, place in zip(ctx.weights, ctx.places, strict=True))
        if grouped.needs_own_gradients(ctx, grads) or is_moved:
            return None, None, *grouped.own_gradients(ctx, grads)
        rows, scale = _rows(ctx.weights), ctx.scale
        parts = [
            torch.zeros(weight.shape, dtype=ctx.dtype, device=weight.device) if grad is None else grad
            for weight, grad in zip(ctx.weights, grads, strict=True)
        ]
        grad = torch.cat([grouped.rows_of_gradient(g, w).view(-1) for g, w in zip(parts, ctx.weights, strict=True)])
        d_x, d_scale = torch.empty(rows.size, device=scale.device), torch.empty_like(scale)
        with torch.cuda.device_of(scale):
            _backward[(len(scale),)](
                rows.addresses, rows.lengths, rows.offsets, scale, grad, *ctx.stats, d_x, d_scale,
                CENTERED=is_centered(ctx.variant), BLOCK=_BLOCK,
            )  # fmt: skip
        d_weights = grouped.in_layouts_of(ctx.weights, d_x)
        d_weights = (None if grad is None else d for grad, d in zip(grads, d_weights, strict=True))
        return None, None, d_scale if ctx.needs_input_grad[2] else None, *d_weights


def triton_weights(
    weights: Sequence[Tensor], variant: str, alphas: Sequence[float | Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Same as :func:`enc_plugin.functional.grouped.enc_weights`, for weights that :func:`can_take` accepts."""
    return list(_AllRows.apply(variant, dtype, grouped.factors(weights, variant, alphas), *weights))


def can_take(weights: Sequence[Tensor], variant: str, dtype: torch.dtype) -> bool:
    """Whether the kernels support the weights and give right results on their device.

    The first call on a device compares the kernels with torch's operations, which waits for the device. If they fail
    or differ by more than rounding, it warns, and torch's operations are used from then on.
    """
    fits = variant in ("wn", "ws") and all(w.dtype == torch.float32 and grouped.has_whole_rows(w) for w in weights)
    if not fits or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    device = weights[0].device
    is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if is_captured and (_key(weights) not in _tables or device not in _is_right):
        return False  # neither copies from the host nor waits are allowed during capture
    if device not in _is_right:
        _is_right[device] = _trial(weights, variant, dtype)
    return _is_right[device]


_is_right: dict[torch.device, bool] = {}


def _trial(weights: Sequence[Tensor], variant: str, dtype: torch.dtype) -> bool:
    problem = None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            free = [weight.detach().requires_grad_() for weight in weights]
            found, expected = (
                _outputs_and_gradients(compute(free, variant, [1.0] * len(free), dtype), free)
                for compute in (triton_weights, grouped.enc_weights)
            )
            errors = [(x - y).norm() / y.norm() for x, y in zip(found, expected, strict=True)]
            error = torch.stack(errors).max().item()
        if not error <= 2 * torch.finfo(dtype).eps + 1e-5:  # NaN too
            problem = f"their results differ from torch's by a relative {error:.1e}"
    except Exception as failure:  # a missing compiler, a device that is too old, ...
        problem = f"{type(failure).__name__}: {failure}"
    if problem is not None:
        warnings.warn(
            f"ENC: the Triton kernels for ENC weights are not used on {weights[0].device} ({problem}); torch's "
            "operations are used instead, which need more launches",
            stacklevel=2,
        )
    return problem is None


def _outputs_and_gradients(whats: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(whats, weights, [weight.detach().cos().to(whats[0].dtype) for weight in weights])
    return [x.detach().float() for x in (*whats, *gradients)]
