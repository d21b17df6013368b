"""Triton kernels for the variants that normalise whole layers, ``'fro'`` and ``'centered_fro'`` (eq. 20 and 23).

A chunk of a layer is the work of one program, so all weights of a network take three launches: sums of chunks, norms of
layers, results. Importing this module needs Triton.
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

_BLOCK = 1024  # elements per load
_CHUNK = 8192  # elements of a program


@triton.jit
def _chunk_moments(chunks, lengths, sums, squares, CENTERED: tl.constexpr, BLOCK: tl.constexpr):
    """Chunk j: its sum if CENTERED, and its sum of squares about its mean, or else about 0."""
    j = tl.program_id(0)
    x_ptr = tl.load(chunks + j).to(tl.pointer_type(tl.float32))
    n = tl.load(lengths + j)
    mean = 0.0
    if CENTERED:
        total = sum_of(x_ptr, n, BLOCK)
        mean = total / n
        tl.store(sums + j, total)
    tl.store(squares + j, squares_about(mean, x_ptr, n, BLOCK))


@triton.jit
def _layer_norms(
    firsts, counts, sizes, lengths, sums, squares, means, inverses, CENTERED: tl.constexpr, BLOCK: tl.constexpr
):
    """Layer l: mean if CENTERED, else 0, and the inverse of the norm about it, from the moments of its chunks."""
    layer = tl.program_id(0)
    first, count = tl.load(firsts + layer), tl.load(counts + layer)
    mean = 0.0
    if CENTERED:
        mean = sum_of(sums + first, count, BLOCK) / tl.load(sizes + layer)
    square = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, count, BLOCK):
        i = k + tl.arange(0, BLOCK)
        square += tl.load(squares + first + i, mask=i < count, other=0.0)
        if CENTERED:
            n = tl.load(lengths + first + i, mask=i < count, other=1)
            d = tl.load(sums + first + i, mask=i < count, other=0.0) / n - mean
            square += tl.where(i < count, n * d * d, 0.0)
    tl.store(means + layer, mean)
    tl.store(inverses + layer, 1.0 / tl.sqrt(tl.sum(square, 0)))


@triton.jit
def _forward(chunks, lengths, offsets, layers, scales, means, inverses, out, BLOCK: tl.constexpr):
    """``scale (x - mean) / norm``."""
    j = tl.program_id(0)
    x_ptr = tl.load(chunks + j).to(tl.pointer_type(tl.float32))
    n, layer = tl.load(lengths + j), tl.load(layers + j)
    out += tl.load(offsets + j)
    mean = tl.load(means + layer)
    factor = tl.load(scales + layer) * tl.load(inverses + layer)
    write_results(out, x_ptr, mean, factor, n, BLOCK)


@triton.jit
def _chunk_products(chunks, lengths, offsets, layers, grads, means, sums, products, BLOCK: tl.constexpr):
    """Chunk j: the sums of g and of g (x - mean)."""
    j = tl.program_id(0)
    x_ptr = tl.load(chunks + j).to(tl.pointer_type(tl.float32))
    n = tl.load(lengths + j)
    grads += tl.load(offsets + j)
    mean = tl.load(means + tl.load(layers + j))
    total, product = products_of(grads, x_ptr, mean, n, BLOCK)
    tl.store(sums + j, total)
    tl.store(products + j, product)


@triton.jit
def _layer_slopes(firsts, counts, sizes, sums, products, inverses, mean_grads, d_scales, BLOCK: tl.constexpr):
    """Layer l: the mean of g, and the gradient of the scale."""
    layer = tl.program_id(0)
    first, count = tl.load(firsts + layer), tl.load(counts + layer)
    tl.store(mean_grads + layer, sum_of(sums + first, count, BLOCK) / tl.load(sizes + layer))
    tl.store(d_scales + layer, sum_of(products + first, count, BLOCK) * tl.load(inverses + layer))


@triton.jit
def _backward(
    chunks, lengths, offsets, layers, scales, grads, means, inverses, mean_grads, d_scales, out,
    CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0)
    x_ptr = tl.load(chunks + j).to(tl.pointer_type(tl.float32))
    n, layer, offset = tl.load(lengths + j), tl.load(layers + j), tl.load(offsets + j)
    grads += offset
    out += offset
    mean, inverse = tl.load(means + layer), tl.load(inverses + layer)
    slope = tl.load(d_scales + layer) * inverse
    factor = tl.load(scales + layer) * inverse
    mean_grad = 0.0
    if CENTERED:
        mean_grad = tl.load(mean_grads + layer)
    write_gradients(out, grads, x_ptr, mean, factor, mean_grad, slope, n, BLOCK)


class LayerTable(Table):
    """The chunks of some weights."""

    def __init__(self, weights: Sequence[Tensor]):
        super().__init__(weights)
        sizes = [weight.numel() for weight in weights]
        lengths = [[min(_CHUNK, size - start) for start in range(0, size, _CHUNK)] for size in sizes]
        counts, elements = (torch.tensor(x, device="cpu") for x in ([len(own) for own in lengths], sizes))
        layers = torch.arange(len(sizes), device="cpu").repeat_interleave(counts)
        self._chunks = (*self.pieces(lengths), layers.to(self.device))
        # Of each layer: its first chunk, its number of chunks, and its number of elements.
        self._layers = [x.to(self.device) for x in (counts.cumsum(0) - counts, counts, elements)]

    def computed(self, variant: str, dtype: torch.dtype, scale: Tensor) -> tuple[list[Tensor], Stats]:
        """See :meth:`Table.computed`."""
        chunks, lengths, *_ = self._chunks
        out = torch.empty(self.size, dtype=dtype, device=scale.device)
        means, inverses = torch.empty_like(scale), torch.empty_like(scale)
        sums, squares = scale.new_empty((2, len(chunks)))
        options = {"CENTERED": is_centered(variant), "BLOCK": _BLOCK}
        with torch.cuda.device_of(scale):
            _chunk_moments[(len(chunks),)](chunks, lengths, sums, squares, **options)
            _layer_norms[(len(scale),)](*self._layers, lengths, sums, squares, means, inverses, **options)
            _forward[(len(chunks),)](*self._chunks, scale, means, inverses, out, BLOCK=_BLOCK)
        return self.split(out), (means, inverses)

    def pulled_back(self, variant: str, scale: Tensor, stats: Stats, grad: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Table.pulled_back`."""
        means, inverses = stats
        count = len(self._chunks[0])
        d_x, d_scale = scale.new_empty(self.size), torch.empty_like(scale)
        mean_grads = torch.empty_like(scale)
        sums, products = scale.new_empty((2, count))
        with torch.cuda.device_of(scale):
            _chunk_products[(count,)](*self._chunks, grad, means, sums, products, BLOCK=_BLOCK)
            _layer_slopes[(len(scale),)](*self._layers, sums, products, inverses, mean_grads, d_scale, BLOCK=_BLOCK)
            _backward[(count,)](
                *self._chunks, scale, grad, means, inverses, mean_grads, d_scale, d_x,
                CENTERED=is_centered(variant), BLOCK=_BLOCK,
            )  # fmt: skip
        return d_x, d_scale
