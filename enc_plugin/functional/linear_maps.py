"""Norms of the linear maps of layers: Frobenius norm of a convolution, spectral norm of any affine map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_floating_tensor, check_integer, check_type
from .precision import at_least_float32, full_float32


def conv_map_sq_norm(
    weight: Tensor,
    input_size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    r"""Squared Frobenius norm of a zero-padded convolution, as a linear map on inputs of a given size.

    .. math:: \lVert A \rVert_F^2 = \sum_k n_k \lVert W_{:,:,k} \rVert_F^2

    where :math:`n_k` is the number of output positions at which kernel element k reads a pixel and not the padding.
    This is the norm that the bound of eq. 17 needs. The norm of the kernel, which weight decay and ENC control, counts
    each element once.

    Args:
        weight: Kernel, ``(out, in / groups, *kernel)``, with any number of groups.
        input_size: Size of the input without batch and channels, ``(H, W)`` for images.
        stride: As in torch's convolutions, a number or one per dimension.
        padding: As in torch's convolutions, including ``'same'`` and ``'valid'``.
        dilation: As in torch's convolutions.

    Returns:
        Scalar of the dtype of ``weight`` (float32 at least).

    Raises:
        ValueError: If ``input_size`` does not fit the kernel, or an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> conv_map_sq_norm(torch.ones(1, 1, 3), (4,), padding=1)  # the tridiagonal 4 x 4 matrix of ones
        tensor(10.)
    """
    check_floating_tensor("weight", weight)
    if weight.ndim < 2:
        raise ValueError(f"weight: expected (out, in / groups, *kernel), got shape {tuple(weight.shape)}")
    kernel = weight.shape[2:]
    check_type("input_size", input_size, (list, tuple), f"a sequence of {len(kernel)} sizes")
    if len(input_size) != len(kernel):
        raise ValueError(
            f"input_size: expected {len(kernel)} sizes for a kernel of shape {tuple(weight.shape)}, "
            f"got {tuple(input_size)}"
        )
    input_size = _per_dimension("input_size", input_size, len(kernel), 1)
    strides = _per_dimension("stride", stride, len(kernel), 1)
    dilations = _per_dimension("dilation", dilation, len(kernel), 1)
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise ValueError(f"padding: expected a number, one per dimension, 'same' or 'valid', got {padding!r}")
    paddings = None if isinstance(padding, str) else _per_dimension("padding", padding, len(kernel), 0)
    reads = []
    for i, (size, taps) in enumerate(zip(input_size, kernel, strict=True)):
        reach = dilations[i] * (taps - 1)
        both = (reach if padding == "same" else 0) if paddings is None else 2 * paddings[i]
        before = both // 2
        if size + both <= reach:
            raise ValueError(
                f"input_size: expected input plus padding >= {reach + 1}, the size of the dilated kernel, got {size} + "
                f"{both} (padding)"
            )
        outputs = torch.arange((size + both - reach - 1) // strides[i] + 1, device="cpu") * strides[i] - before
        pixels = outputs[:, None] + torch.arange(taps, device="cpu") * dilations[i]
        reads.append(pixels.where((pixels >= 0) & (pixels < size), -1))
    return map_rows_sq_norm(weight, reads).sum()


@full_float32()
def map_rows_sq_norm(weight: Tensor, reads: Sequence[Tensor]) -> Tensor:
    r"""Squared norm of a convolution as a linear map, for each output channel and with any padding.

    .. math:: \lVert A_j \rVert^2 = \sum_{k,l} n_{kl} \langle W_{j,:,k}, W_{j,:,l} \rangle

    where :math:`n_{kl}` is the number of output positions at which the kernel elements k and l read the same pixel.
    With zero padding, different elements never do, and the formula becomes that of :func:`conv_map_sq_norm`.

    Args:
        weight: Kernel, ``(out, in / groups, *kernel)``.
        reads: For each dimension, a tensor ``(outputs, kernel size)`` with the index of the pixel that a kernel
            element reads, -1 for a zero of the padding.

    Returns:
        ``(out,)``, of the dtype of ``weight`` (float32 at least).
    """
    weight = weight.to(at_least_float32(weight.dtype))
    met = weight
    for dim, pixels in enumerate(reads, start=2):
        same = (pixels[:, :, None] == pixels[:, None, :]) & (pixels >= 0)[:, :, None]
        met = torch.tensordot(met.movedim(dim, -1), same.sum(0).to(met), 1).movedim(-1, dim)
    return (weight * met).flatten(1).sum(1)


def _per_dimension(name: str, value: int | Sequence[int], count: int, minimum: int) -> list[int]:
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name}: expected a number or {count} of them, got {value!r}")
    for number in values:
        check_integer(name, number, minimum, below=2**31)
    return values


@torch.enable_grad()
@full_float32()
def map_spectral_norm(
    function: Callable[[Tensor], Tensor], like: Tensor, *, max_iterations: int = 500, tolerance: float = 1e-5
) -> float:
    r"""Spectral norm :math:`\lVert A \rVert_2` of an affine map :math:`x \mapsto A x + b`, such as a convolution.

    Computed by power iteration on :math:`A^\top A`, with the map's forward and backward pass. The estimate approaches
    the norm from below.

    Args:
        function: Differentiable map of one sample or batch; a batch norm in it must be in eval mode. If the samples
            of a batch do not depend on each other, the norm is that of one sample's map.
        like: Example input; only its shape, dtype and device are used.
        max_iterations: Maximum number of iterations.
        tolerance: Relative change of the estimate below which the iteration stops.

    Returns:
        The norm; 0 for a constant map.

    Raises:
        ValueError: If the map is not affine, or an option is out of range.

    Example:
        >>> round(map_spectral_norm(lambda x: x @ torch.diag(torch.tensor([3.0, 4.0])) + 1, torch.zeros(1, 2)), 4)
        4.0
    """
    check_floating_tensor("like", like)
    check_integer("max_iterations", max_iterations, 1)
    generator = torch.Generator(like.device).manual_seed(0)  # does not change the global random state
    x = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device).requires_grad_()
    with torch.no_grad():
        offset = function(torch.zeros_like(like))
        once, turned = function(x) - offset, function(-2 * x) - offset
        if not torch.allclose(turned, -2 * once, rtol=1e-3, atol=1e-3 * once.abs().max().item()):
            raise ValueError(
                "function: expected an affine map x -> A x + b, got one that is not; leave out activations, and set "
                "batch norms to eval mode"
            )
    norm = 0.0
    for _ in range(max_iterations):
        y = function(x) - offset
        (back,) = torch.autograd.grad(y, x, y.detach())  # A^T A x
        before = norm
        norm = (y.double().norm() / x.double().norm()).item()
        if norm == 0 or abs(norm - before) <= tolerance * norm:
            break
        x = (back / back.norm()).detach().requires_grad_()
    return norm
