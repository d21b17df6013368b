"""The epsilon-shifted L2 regularizer (Li et al., arXiv:1911.05920), and how strongly weight decay acts in a run.

ENC layers are scale-invariant in W, so plain weight decay drives W towards 0. The shifted regularizer has its minimum
at the norm or standard deviation ``eps`` instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .checks import check_not_negative, check_number, check_type
from .grouped import computed, factors, normalized
from .weights import check_variant, check_weight, enc_weight, is_centered, is_whole_layer, num_rows

# (whole layer, centered) -> the variant that divides by the same norms.
_DIVISIONS = {(False, False): "wn", (True, False): "fro", (False, True): "ws", (True, True): "centered_fro"}


def shift_direction(weight: Tensor, variant: str) -> Tensor:
    r"""Direction U along which the shift increases the norm (or the standard deviation) of the weight.

    For ``'fro'`` and ``'wn'``, row j of U is :math:`W_j / \lVert W_j \rVert`, the gradient of
    :math:`\sum_j \lVert W_j \rVert`. For ``'ws'`` and ``'centered_fro'`` it is
    :math:`(W_j - \bar W_j) / \mathrm{std}\, W_j`, the gradient of :math:`n \sum_j \mathrm{std}\, W_j`. Both are the
    effective weight of ENC with another ``alpha``.

    Args:
        weight: Free weight W, as in :func:`enc_weight`.
        variant: As in :func:`enc_weight`. For ``'fro'`` and ``'centered_fro'`` the whole layer counts as one row.

    Returns:
        Tensor of the shape, dtype and device of ``weight``.
    """
    check_variant(variant)
    check_weight(weight)
    return enc_weight(weight, _division(variant), _alpha_of_direction(weight, variant))


def direction_settings(weights: Sequence[Tensor], variant: str) -> tuple[str, list[float]]:
    """The variant and the values of alpha with which the effective weights of ENC are the shift directions."""
    return _division(variant), [_alpha_of_direction(weight, variant) for weight in weights]


def _division(variant: str) -> str:
    return _DIVISIONS[is_whole_layer(variant), is_centered(variant)]


def _alpha_of_direction(weight: Tensor, variant: str) -> float:
    return float(weight.numel() if is_centered(variant) else num_rows(weight, variant))


def direction_of_rows(weight: Tensor, variant: str) -> Tensor:
    """:func:`shift_direction` with less overhead, for a weight or some of its rows, whose values are not checked."""
    variant = _division(variant)
    if torch.is_grad_enabled() or is_whole_layer(variant):
        return shift_direction(weight, variant)
    if weight.ndim == 2 and weight.is_contiguous() and weight.dtype in (torch.float32, torch.float64):
        return normalized(weight, variant, weight.new_ones(len(weight)))[0]
    return computed([weight], variant, factors([weight], variant, [_alpha_of_direction(weight, variant)]))[0][0]


def shifted_l2_grad(weight: Tensor, variant: str, eps: float) -> Tensor:
    r"""Gradient of the eps-shifted L2 regularizer for lambda = 1.

    For ``'fro'`` and ``'wn'``, row j of the gradient and the regularizer are

    .. math:: (1 - \epsilon / \lVert W_j \rVert)\, W_j, \qquad \tfrac12 \sum_j (\lVert W_j \rVert - \epsilon)^2

    and for ``'ws'`` and ``'centered_fro'``

    .. math:: (1 - \epsilon / \mathrm{std}_j)(W_j - \bar W_j) + \bar W_j, \qquad
        \tfrac n2 \sum_j [(\mathrm{std}_j - \epsilon)^2 + \bar W_j^2]

    Both gradients equal :math:`W - \epsilon\, U` with U the :func:`shift_direction`; ``eps = 0`` is plain weight decay.

    Args:
        weight: Free weight W, as in :func:`enc_weight`.
        variant: As in :func:`enc_weight`.
        eps: Target of the rows' norm (``'fro'``, ``'wn'``) or standard deviation (``'ws'``, ``'centered_fro'``), in
            units of W, >= 0.

    Returns:
        Tensor of the shape, dtype and device of ``weight``.

    Raises:
        ValueError: If ``eps`` is negative, and as :func:`enc_weight`.

    Example:
        >>> import torch
        >>> shifted_l2_grad(torch.tensor([[3.0, 4.0]]), "wn", eps=5.0)
        tensor([[0., 0.]])
    """
    check_shift_eps(eps)
    return weight - eps * shift_direction(weight, variant)


def decay_efolds(
    learning_rates: Iterable[float], weight_decay: float, momentum: float = 0.0, dampening: float = 0.0
) -> float:
    r"""How strongly weight decay acts in a run, in e-folds of :math:`\lVert W \rVert^2`.

    SGD with momentum :math:`\mu` and dampening d adds :math:`\lambda W` to the gradient. Each such term enters the
    momentum buffer with the factor :math:`1 - d` and decays there as a geometric series, so a step with learning rate
    :math:`\eta_t` shrinks W by :math:`\eta_t \lambda (1 - d) / (1 - \mu)` in total:

    .. math:: \Delta \log \lVert W \rVert^2 = -\frac{2 \lambda (1 - d)}{1 - \mu} \sum_t \eta_t

    to first order in :math:`\eta\lambda`. This is the effect of weight decay alone. If a batch norm makes W
    scale-invariant, the gradient of the loss is orthogonal to W and increases its norm. The two effects balance after
    a few e-folds, and then the norm does not depend on its initial value.

    Args:
        learning_rates: Learning rates of all optimizer steps of the run.
        weight_decay: Lambda, >= 0.
        momentum: Momentum of SGD (with or without Nesterov), in [0, 1). For decoupled weight decay (AdamW), which
            bypasses the momentum: 0.
        dampening: Dampening of SGD's momentum.

    Returns:
        Number of e-folds, >= 0. One e-fold means that weight decay alone would divide :math:`\lVert W \rVert^2` by e.
        The paper's ImageNet recipe has 33.

    Raises:
        ValueError: If ``momentum`` is not in [0, 1), or ``weight_decay`` is negative.
        TypeError: If ``learning_rates`` is a single number.

    Example:
        >>> steps = [lr for lr in (0.1, 0.01, 0.001) for _ in range(30 * 5004)] + [1e-4] * (10 * 5004)
        >>> round(decay_efolds(steps, weight_decay=1e-4, momentum=0.9), 1)
        33.3
    """
    check_type("learning_rates", learning_rates, Iterable, "the rate of each step, such as [0.1] * steps")
    check_not_negative("weight_decay", weight_decay)
    check_number("momentum", momentum, "a number in [0, 1)", lambda value: 0 <= value < 1)
    check_number("dampening", dampening, "a number in [0, 1]", lambda value: 0 <= value <= 1)
    return 2 * weight_decay * (1 - dampening) / (1 - momentum) * sum(learning_rates)


def check_shift_eps(eps: float, name: str = "eps") -> None:
    """Raise unless ``eps`` is a finite number >= 0; ``name`` is the argument's name in the message."""
    check_not_negative(name, eps, " (0 turns the shift off)")
