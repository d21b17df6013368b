"""Bounds on the GBR by the norms of the layers (eq. 17), and on the loss by robustness (theorems 1 and 2)."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from .checks import check_floating_tensor, check_number


def bound_chain(weights: Iterable[Tensor | float]) -> dict[str, float]:
    r"""Two upper bounds on the GBR of a bias-free network whose activations have slopes of at most 1 (eq. 17).

    .. math:: \mathrm{GBR} \le \prod_{i=1}^L \lVert W^i \rVert_F^2
        \le \Bigl( \frac1L \sum_{i=1}^L \lVert W^i \rVert_F^2 \Bigr)^L

    The second step is the inequality of arithmetic and geometric means. It is an equality if all norms are equal, as
    ENC makes them. Its slack, ``log_mean_power - log_product``, measures how unequal the norms of a network are.

    Args:
        weights: The weights of the layers, ``(out, in)`` or ``(out, in / groups, *kernel)``. A number, or a tensor
            without dimensions, is taken as a squared norm. The inequality is about linear maps, so for a convolution
            pass :func:`~enc_plugin.functional.conv_map_sq_norm` instead of the kernel.

    Returns:
        ``product`` and ``mean_power`` (infinite or 0 if a float cannot represent them), ``log_product`` and
        ``log_mean_power`` (natural logarithms, which do not overflow at any depth).

    Raises:
        ValueError: If there are no weights, a weight is a vector (biases and batch norms are no layers of eq. 17), or a
            squared norm is negative.
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
    logs = torch.tensor([_log_sq_norm(weight) for weight in weights], dtype=torch.float64, device="cpu")
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
        if weight.ndim == 1:
            raise ValueError(
                f"weights: expected matrices and kernels, got a vector of shape {tuple(weight.shape)}; leave out "
                "biases and batch norms ([p for p in model.parameters() if p.ndim > 1]). enc_plugin.audit(model, "
                "folded=True) folds batch norms into the layers"
            )
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


def residual_log_bound(
    classifier_sq_norm: float, stem_norm: float, blocks: Iterable[tuple[float, Iterable[float]]]
) -> float:
    r"""Logarithm of an upper bound on the GBR of a residual network without biases.

    .. math:: \mathrm{GBR} \le \lVert W_\mathrm{fc} \rVert_F^2\, \lVert A_\mathrm{stem} \rVert_2^2
        \prod_b \bigl( \lVert S_b \rVert_2 + \textstyle\prod_i \lVert W_b^i \rVert_F \bigr)^2

    A block's Jacobian is :math:`D\,(S_b + W_b^k D_{k-1} \cdots W_b^1)` with slopes D of at most 1, so its spectral norm
    is at most that of the shortcut plus the product of the branch's norms; the Frobenius norm of a product is at most
    one factor's Frobenius norm times the others' spectral norms. (The product over all layers, as in eq. 17, is not a
    bound.) All norms are of the linear maps in eval mode, with batch norms folded in; for a convolution see
    :func:`~enc_plugin.functional.conv_map_sq_norm`. An average pooling before the classifier is left out, because its
    spectral norm is at most 1.

    Args:
        classifier_sq_norm: Squared Frobenius norm of the classifier's weight.
        stem_norm: Spectral norm of the stem (:func:`~enc_plugin.functional.map_spectral_norm`).
        blocks: For each block, the spectral norm of its shortcut (1 for the identity) and the Frobenius norms of the
            layers of its branch.

    Returns:
        Natural logarithm of the bound; -inf where a factor is 0.

    Raises:
        ValueError: If a norm is negative.

    Example:
        >>> round(residual_log_bound(4.0, 1.0, [(1.0, [2.0, 0.5])]), 4)  # 4 * (1 + 1)^2
        2.7726
    """
    factors = [math.sqrt(_norm("classifier_sq_norm", classifier_sq_norm)), _norm("stem_norm", stem_norm)]
    for shortcut, branch in blocks:
        factors.append(_norm("blocks", shortcut) + math.prod(_norm("blocks", norm) for norm in branch))
    return 2 * sum(math.log(factor) if factor else -math.inf for factor in factors)


def _norm(name: str, value: float) -> float:
    check_number(name, value, "a norm, which is finite and not negative", lambda v: 0 <= v < math.inf)
    return float(value)


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
