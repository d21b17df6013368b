"""Rotations on the constraint set of eq. 19, and the angle by which training turns weights in equilibrium."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_not_negative, check_number
from .weights import check_variant, check_weight, is_centered, num_rows


def rotate(weight: Tensor, update: Tensor, angle: float | Tensor, variant: str) -> Tensor:
    r"""Turn every row of a weight on the constraint set by an angle, in the direction of its update.

    .. math:: W_j \leftarrow \cos\theta\, W_j + \sin\theta\, \lVert W_j \rVert\, \frac{t_j}{\lVert t_j \rVert},
        \qquad t_j = u_j - \bar u_j - \frac{\langle u_j, W_j \rangle}{\lVert W_j \rVert^2} W_j

    where only the variants that remove means subtract the mean :math:`\bar u_j` of the update u. The length of the
    update has no influence. A row stays as it is if its update does not turn it, because all but rounding (in float32:
    three thousandths) is along W or constant.

    Args:
        weight: Weight W on the constraint set, ``(out, in)`` or ``(out, in / groups, *kernel)``. Computed in float32 at
            least.
        update: Update u of the same shape.
        angle: Angle theta in radians, a number or a tensor of one element.
        variant: As in :func:`enc_weight`; the whole-layer variants turn the layer as one row.

    Returns:
        Tensor of the shape, dtype and device of ``weight``, with the same row norms and means.

    Example:
        >>> rotate(torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 0.1]]), torch.pi / 6, "wn").round(decimals=3)
        tensor([[1.7320, 1.0000]])
    """
    check_variant(variant)
    check_weight(weight)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w, u = (x.reshape(num_rows(weight, variant), -1).to(dtype) for x in (weight, update))
    turned = u.clone()
    mean = turned.mean(1, keepdim=True)
    (gain,) = turn_rows_([w], [turned], angle, is_centered(variant))
    if is_centered(variant):
        turned.sub_(gain * mean)
    return turned.reshape(weight.shape).to(weight.dtype)


def turn_rows_(ws: Sequence[Tensor], us: Sequence[Tensor], angle: float | Tensor, centered: bool) -> list[Tensor]:
    """Replace updates by the turned rows, for several matrices at once: the core of :func:`rotate`.

    Only the number of operations on whole matrices grows with the number of matrices.

    Args:
        ws: Matrices of rows ``(rows, n)``, float32 or float64, without means if ``centered``.
        us: An update of each. It is overwritten by the turned rows, from which its mean has not been removed.
        angle: As in :func:`rotate`.
        centered: Whether the mean of an update is ignored.

    Returns:
        For each matrix, the factors ``(rows, 1)`` of its updates in the turned rows.
    """
    # Not vecdot, which autocast would compute in half precision.
    along = torch.cat([(u * w).sum(1) for u, w in zip(us, ws, strict=True)])
    whole, size = (torch.cat([torch.linalg.vector_norm(x, dim=1) for x in xs]).square() for xs in (us, ws))
    # |t|^2 without t, which saves a pass over memory. If only rounding is left of it, t has no direction.
    squared = whole - along.square() / size
    if centered:
        squared -= torch.cat([u.mean(1).square() * u.shape[1] for u in us])
    turns = squared > 64 * torch.finfo(squared.dtype).eps * whole
    # A number stays on the host, because copying it to the device would wait.
    sin, cos = (angle.sin(), angle.cos()) if isinstance(angle, Tensor) else (math.sin(angle), math.cos(angle))
    gain = torch.where(turns, sin * (size / squared).sqrt(), 0)
    kept = torch.where(turns, cos - gain * along / size, 1)
    gains, keeps = (numbers[:, None].split([len(w) for w in ws]) for numbers in (gain, kept))
    for w, u, g, k in zip(ws, us, gains, keeps, strict=True):
        u.mul_(g).addcmul_(w, k)
    return list(gains)


def equilibrium_angle(
    lr: float | Tensor, weight_decay: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False
) -> float | Tensor:
    r"""Angle by which one step of an optimizer with weight decay turns a scale-invariant weight in equilibrium.

    The gradient of a scale-invariant weight is orthogonal to it. Assume that the gradients of different steps are
    independent, with mean square :math:`s`. An optimizer distributes each gradient over later steps, with the
    coefficients :math:`\eta c_k`. So a gradient adds :math:`\eta^2 (\sum_k c_k)^2 s` to :math:`\lVert W \rVert^2`, and
    a step of decay subtracts :math:`2 \eta \lambda \sum_k c_k \lVert W \rVert^2`. When both balance, the mean square
    angle of a step, :math:`\eta^2 \sum_k c_k^2\, s / \lVert W \rVert^2`, is

    .. math:: \theta^2 = 2 \eta \lambda\, \frac{\sum_k c_k^2}{\sum_k c_k}

    =================  ========================================  ==================================================
    optimizer          :math:`c_k`                               :math:`\theta^2`
    =================  ========================================  ==================================================
    SGD                1, then 0                                 :math:`2\eta\lambda`
    SGD, momentum      :math:`(1 - d) \mu^k`                     :math:`2\eta\lambda (1 - d) / (1 + \mu)`
    SGD, Nesterov      :math:`1 + \mu`, then :math:`\mu^{k+1}`   by the sums
    AdamW              :math:`(1 - \beta_1) \beta_1^k`           :math:`2\eta\lambda (1 - \beta_1) / (1 + \beta_1)`
    =================  ========================================  ==================================================

    with dampening d. AdamW rescales gradients to a size that does not depend on W, which does not change the balance;
    pass ``momentum=beta1, dampening=beta1``. SGD with momentum and AdamW are in arXiv 2305.17212.

    Args:
        lr: Learning rate eta, a number or a tensor of one element.
        weight_decay: Lambda, not negative.
        momentum: Mu, in [0, 1).
        dampening: Of the momentum, in [0, 1).
        nesterov: Whether the momentum is Nesterov's.

    Returns:
        Root mean square angle of a step, in radians.

    Raises:
        ValueError: If ``momentum`` or ``dampening`` is not in [0, 1), or ``weight_decay`` is negative.

    Example:
        >>> round(equilibrium_angle(0.1, 1e-4, momentum=0.9), 6)
        0.003244
    """
    check_not_negative("weight_decay", weight_decay)
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        check_number(name, value, "a number in [0, 1)", lambda value: 0 <= value < 1)
    first = 1 + momentum if nesterov else 1 - dampening
    later = momentum**2 if nesterov else (1 - dampening) * momentum  # of the next step; each one after times momentum
    total, squares = first + later / (1 - momentum), first**2 + later**2 / (1 - momentum**2)
    return (2 * weight_decay * squares / total * lr) ** 0.5
