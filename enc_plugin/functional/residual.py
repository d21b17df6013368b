"""An upper bound on the GBR of a residual network, for which the product of eq. 17 is not a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .checks import check_integer, check_number, check_type


def residual_log_bound(
    classifier_sq_norm: float, stem_norm: float, blocks: Iterable[tuple[float, Iterable[float]]]
) -> float:
    r"""Logarithm of an upper bound on the GBR of a residual network without biases.

    .. math:: \mathrm{GBR} \le \lVert W_\mathrm{fc} \rVert_F^2\, \lVert A_\mathrm{stem} \rVert_2^2
        \prod_b \bigl( \lVert S_b \rVert_2 + \textstyle\prod_i \lVert W_b^i \rVert_F \bigr)^2

    A block's Jacobian is :math:`D\,(S_b + W_b^k D_{k-1} \cdots W_b^1)` with slopes D of at most 1, so its spectral norm
    is at most that of the shortcut plus the product of the branch's norms; the Frobenius norm of a product is at most
    one factor's Frobenius norm times the others' spectral norms. All norms are of the linear maps in eval mode, with
    batch norms folded in (for a convolution see :func:`conv_map_sq_norm`). An average pooling in front of the
    classifier is left out, because its spectral norm is at most 1.

    Args:
        classifier_sq_norm: Squared Frobenius norm of the classifier's weight.
        stem_norm: Spectral norm of the stem (:func:`map_spectral_norm`).
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


@torch.enable_grad()
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
    check_type("like", like, Tensor, "a floating point tensor")
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
        norm = math.sqrt((back.double() * x.detach().double()).sum().item() / x.double().square().sum().item())
        if norm == 0 or abs(norm - before) <= tolerance * norm:
            break
        x = (back / back.norm()).detach().requires_grad_()
    return norm
