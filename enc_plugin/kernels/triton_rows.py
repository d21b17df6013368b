"""Triton kernels for the variants that normalise rows, ``'wn'`` and ``'ws'`` (eq. 21 and 22).

A row is the work of one program, so all weights of a network take one launch. Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..functional.weights import is_centered
from .triton_loops import products_of, squares_about, sum_of, write_gradients, write_results
from .triton_table import Stats, Table

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
    write_results(out, x_ptr, mean, factor, n, BLOCK)
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
    total, product = products_of(grads, x_ptr, mean, n, BLOCK)
    dot = product * inverse
    slope = dot * inverse
    mean_grad = 0.0
    if CENTERED:
        slope = slope / n
        mean_grad = total / n
    factor = tl.load(scales + r) * inverse
    write_gradients(out, grads, x_ptr, mean, factor, mean_grad, slope, n, BLOCK)
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
        d_x, d_scale = scale.new_empty(self.size), torch.empty_like(scale)
        with torch.cuda.device_of(scale):
            _backward[(len(scale),)](
                *self._rows, scale, grad, *stats, d_x, d_scale, CENTERED=is_centered(variant), BLOCK=_BLOCK
            )
        return d_x, d_scale
