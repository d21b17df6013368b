"""The bounds of the paper: theorems 1 and 2 (robustness), and eq. 17 (GBR by the weights' norms)."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .checks import check_floating_tensor, check_integer, check_number, check_type


def bound_chain(weights: Iterable[Tensor | float]) -> dict[str, float]:
    r"""Two upper bounds on the GBR of a bias-free network whose activations have slopes of at most 1 (eq. 17).

    .. math:: \mathrm{GBR} \le \prod_{i=1}^L \lVert W^i \rVert_F^2
        \le \Bigl( \frac1L \sum_{i=1}^L \lVert W^i \rVert_F^2 \Bigr)^L

    The second step is the inequality of arithmetic and geometric means. It is an equality if all norms are equal, as
    ENC makes them. Its slack, ``log_mean_power - log_product``, measures how unequal the norms of a network are.

    Args:
        weights: The weights of the layers, ``(out, in)`` or ``(out, in / groups, *kernel)``. A number, or a tensor
            without dimensions, is taken as a squared norm. The inequality is about linear maps, so for a convolution
            pass :func:`conv_map_sq_norm` instead of the kernel.

    Returns:
        ``product`` and ``mean_power`` (infinite or 0 if a float cannot represent them), ``log_product`` and
        ``log_mean_power`` (natural logarithms, which do not overflow at any depth).

    Raises:
        ValueError: If there are no weights, or a squared norm is negative.
        TypeError: If a weight is neither a tensor nor a number.

    Example:
        >>> chain = bound_chain([torch.eye(2), torch.eye(2) * 2])
        >>> round(chain["product"], 6), round(chain["mean_power"], 6)
        (16.0, 25.0)
    """
    if isinstance(weights, (str, bytes, dict)) or not isinstance(weights, Iterable):
        raise TypeError(f"weights: expected a sequence of tensors or squared norms, got {type(weights).__name__}")
    if isinstance(weights, Tensor) and weights.ndim != 1:
        raise TypeError(
            f"weights: expected a sequence with a tensor for each layer, got one tensor of shape {tuple(weights.shape)}"
        )
    logs = torch.tensor([_log_sq_norm(weight) for weight in weights], dtype=torch.float64)
    if not len(logs):
        raise ValueError("weights: expected at least one layer, got none")
    log_product = logs.sum().item()
    log_mean_power = len(logs) * (logs.logsumexp(0).item() - math.log(len(logs)))
    # If the norms are equal, rounding could reverse the inequality.
    log_mean_power = max(log_product, log_mean_power) if not math.isnan(log_product) else log_mean_power
    return {
        "product": _exp(log_product),
        "mean_power": _exp(log_mean_power),
        "log_product": log_product,
        "log_mean_power": log_mean_power,
    }


def _log_sq_norm(weight: Tensor | float) -> float:
    if isinstance(weight, Tensor) and weight.ndim:
        check_floating_tensor("weights", weight)
        w = weight.detach().double()
        largest = w.abs().amax() if w.numel() else w.new_zeros(())
        if not 0 < largest < math.inf:
            return w.square().sum().log().item()
        # Scaled, so that squares neither overflow nor underflow.
        return (2 * largest.log() + (w / largest).square().sum().log()).item()
    value = weight.item() if isinstance(weight, Tensor) else weight
    check_number("weights", value, "tensors or squared norms that are not negative", lambda v: not v < 0)
    return math.log(value) if value != 0 else -math.inf  # the logarithm passes NaN on


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else value * math.inf


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
        outputs = torch.arange((size + both - reach - 1) // strides[i] + 1) * strides[i] - before
        pixels = outputs[:, None] + torch.arange(taps) * dilations[i]
        reads.append(pixels.where((pixels >= 0) & (pixels < size), -1))
    return map_rows_sq_norm(weight, reads).sum()


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
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
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


def robustness_gap(delta_s: float, n: int, num_cells: int, loss_bound: float, confidence: float) -> float:
    r"""Bound on the gap between expected and empirical loss (theorem 1; Xu & Mannor, 2012).

    .. math:: d(s) + M \sqrt{\frac{2 K \ln 2 + 2 \ln(1/\delta)}{n}}

    Args:
        delta_s: d(s), the largest variation of the loss within a cell, >= 0; see :func:`robustness_delta`.
        n: Number of training samples.
        num_cells: K, the number of cells that the sample space is divided into.
        loss_bound: M, the largest value of the loss.
        confidence: Probability 1 - delta with which the bound holds, in [0, 1).

    Returns:
        The bound, in the unit of the loss.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is not a number.

    Example:
        >>> round(robustness_gap(0.1, n=10_000, num_cells=10, loss_bound=1.0, confidence=0.95), 4)
        0.1446
    """
    for name, value, low in (
        ("delta_s", delta_s, 0),
        ("n", n, 1),
        ("num_cells", num_cells, 1),
        ("loss_bound", loss_bound, 0),
    ):
        check_number(name, value, f"at least {low}", partial(operator.le, low))
    check_number("confidence", confidence, "a probability 1 - delta in [0, 1)", lambda v: 0 <= v < 1)
    log_inverse_delta = -math.log1p(-confidence)
    return delta_s + loss_bound * math.sqrt((2 * num_cells * math.log(2) + 2 * log_inverse_delta) / n)


def robustness_delta(
    gradient_norm: float | Tensor, lipschitz: float, cell_diameter: float, *, task: str = "classification"
) -> float | Tensor:
    r"""Robustness d(s) that a bound on the gradient of the prediction guarantees (theorem 2, solved for d(s)).

    .. math:: d(s) = L \epsilon \, \lVert \partial f / \partial x \rVert \quad\text{(classification)}, \qquad
        L \epsilon \, \lVert \partial f / \partial x \rVert + \epsilon \quad\text{(regression)}

    Args:
        gradient_norm: Upper bound on the norm (not squared) of the gradient everywhere in the cells, such as
            ``gbr(...).max().sqrt()`` (with ``output='label_prob'`` for the paper's A_s(x)). The maximum over samples is
            a bound only as far as the samples represent their cells; the mean over samples is not a bound.
        lipschitz: L, the Lipschitz constant of the loss as a function of the prediction.
        cell_diameter: epsilon, the diameter of a cell, in the unit of the inputs.
        task: ``'classification'`` or ``'regression'``.

    Returns:
        d(s), in the unit of the loss, for :func:`robustness_gap`; has the shape of ``gradient_norm``.

    Raises:
        ValueError: If ``task`` is unknown, ``lipschitz`` or ``cell_diameter`` is not positive, or ``gradient_norm`` is
            negative.
        TypeError: If an argument is not a number.

    Example:
        >>> robustness_delta(2.0, lipschitz=1.0, cell_diameter=0.5)
        1.0
    """
    if not isinstance(task, str) or task not in ("classification", "regression"):
        raise ValueError(f"task: expected 'classification' or 'regression', got {task!r}")
    for name, value in (("lipschitz", lipschitz), ("cell_diameter", cell_diameter)):
        check_number(name, value, "a positive number", lambda v: v > 0)
    if isinstance(gradient_norm, Tensor):
        check_floating_tensor("gradient_norm", gradient_norm)
        if (gradient_norm < 0).any():
            raise ValueError(f"gradient_norm: expected norms, which are not negative, got {gradient_norm.min().item()}")
    else:
        check_number("gradient_norm", gradient_norm, "a norm, which is not negative", lambda v: not v < 0)
    offset = cell_diameter if task == "regression" else 0.0
    return lipschitz * cell_diameter * gradient_norm + offset
