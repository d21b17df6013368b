"""Triton kernels for the variants that normalise rows, ``'wn'`` and ``'ws'`` (eq. 21 and 22).

A row is the work of one program, so all weights of a network take one launch. Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functional.weights import is_centered
from .triton_table import Stats, Table, squares_about, sum_of

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
        mean = sum_of(x_ptr, n, BLOCK) / n
    square = squares_about(mean, x_ptr, n, BLOCK)  # this pass and the next read the row from the cache
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


class RowTable(Table):
    """The rows of some weights."""

    def __init__(self, weights: Sequence[Tensor]):
        super().__init__(weights)
        self._rows = self.pieces([[n] * m for m, n in self.shapes])

    def computed(self, variant: str, dtype: torch.dtype, scale: Tensor) -> tuple[list[Tensor], Stats]:
        """See :meth:`Table.computed`."""
        out = torch.empty(self.size, dtype=dtype, device=scale.device)
        means, inverses = torch.empty_like(scale), torch.empty_like(scale)
        with torch.cuda.device_of(scale):
            _forward[(len(scale),)](
                *self._rows, scale, out, means, inverses, CENTERED=is_centered(variant), BLOCK=_BLOCK
            )
        return self.split(out), (means, inverses)

    def pulled_back(self, variant: str, scale: Tensor, stats: Stats, grad: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Table.pulled_back`."""
        d_x, d_scale = torch.empty(self.size, device=scale.device), torch.empty_like(scale)
        with torch.cuda.device_of(scale):
            _backward[(len(scale),)](
                *self._rows, scale, grad, *stats, d_x, d_scale, CENTERED=is_centered(variant), BLOCK=_BLOCK
            )
        return d_x, d_scale
