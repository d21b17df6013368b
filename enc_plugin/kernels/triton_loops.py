"""The loops of Triton's kernels over the elements of a row, or of a chunk of a layer.

Importing this module needs Triton.
"""

import triton
import triton.language as tl


@triton.jit
def sum_of(x_ptr, n, BLOCK: tl.constexpr):
    """Sum of ``n`` elements."""
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, n, BLOCK):
        i = k + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + i, mask=i < n, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def squares_about(mean, x_ptr, n, BLOCK: tl.constexpr):
    """Sum of squares of the differences of ``n`` elements and ``mean``."""
    square = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, n, BLOCK):
        i = k + tl.arange(0, BLOCK)
        d = tl.where(i < n, tl.load(x_ptr + i, mask=i < n, other=0.0) - mean, 0.0)
        square += d * d
    return tl.sum(square, 0)


@triton.jit
def products_of(grads, x_ptr, mean, n, BLOCK: tl.constexpr):
    """Sums of g, and of g (x - mean), for the gradient g of ``n`` results."""
    total = tl.zeros((BLOCK,), tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, n, BLOCK):
        i = k + tl.arange(0, BLOCK)
        g = tl.load(grads + i, mask=i < n, other=0.0).to(tl.float32)
        total += g
        product += g * (tl.load(x_ptr + i, mask=i < n, other=0.0) - mean)
    return tl.sum(total, 0), tl.sum(product, 0)


@triton.jit
def write_results(out, x_ptr, mean, factor, n, BLOCK: tl.constexpr):
    """``factor (x - mean)``."""
    for k in range(0, n, BLOCK):
        i = k + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0)
        tl.store(out + i, ((x - mean) * factor).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def write_gradients(out, grads, x_ptr, mean, factor, mean_grad, slope, n, BLOCK: tl.constexpr):
    """``factor (g - mean_grad - slope (x - mean))``."""
    for k in range(0, n, BLOCK):
        i = k + tl.arange(0, BLOCK)
        g = tl.load(grads + i, mask=i < n, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0)
        tl.store(out + i, factor * (g - mean_grad - (x - mean) * slope), mask=i < n)
