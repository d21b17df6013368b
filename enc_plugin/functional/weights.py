"""The four ENC reparameterizations (eq. 20 to 23): they map a free weight W to the effective weight of a layer.

A *row* of a weight is ``weight[j]``, flattened: all weights of output channel j.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_floating_tensor, check_number

VARIANTS = {
    "fro": "the whole layer divided by its Frobenius norm (eq. 20)",
    "wn": "each row divided by its norm, as weight normalization (eq. 21)",
    "ws": "each row standardized, as weight standardization (eq. 22)",
    "centered_fro": "the whole layer minus its mean, divided by its Frobenius norm (eq. 23)",
}

MAX_ALPHA = 1e30  # far enough from the overflow of float32

# Flattened to one row, 'wn' becomes 'fro' and 'ws' becomes 'centered_fro', so two formulas cover the four variants.
_WHOLE_LAYER = ("fro", "centered_fro")
_CENTERED = ("ws", "centered_fro")


def check_variant(variant: str) -> None:
    """Raise ``ValueError`` unless ``variant`` is one of ``VARIANTS``."""
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")


def check_weight(weight: Tensor) -> None:
    """Raise unless ``weight`` is a floating point tensor with at least two dimensions and one element."""
    check_floating_tensor("weight", weight)
    if weight.ndim < 2:
        raise ValueError(
            f"weight: expected (out, in) or (out, in / groups, *kernel), got shape {tuple(weight.shape)}; "
            "a 1-D parameter has no rows to normalise"
        )
    if not weight.numel():
        raise ValueError(f"weight: expected at least one element, got shape {tuple(weight.shape)}")


def num_rows(weight: Tensor, variant: str) -> int:
    """Number of rows that are normalised independently: 1 for the whole-layer variants, else ``out``."""
    return 1 if is_whole_layer(variant) else weight.shape[0]


def is_whole_layer(variant: str) -> bool:
    """Whether the variant normalises the layer as a whole (``'fro'``, ``'centered_fro'``), not each row."""
    return variant in _WHOLE_LAYER


def is_centered(variant: str) -> bool:
    """Whether the variant subtracts the mean (``'ws'``, ``'centered_fro'``)."""
    return variant in _CENTERED


def min_elements(variant: str) -> int:
    """Smallest number of elements of a row (whole-layer variants: of the layer) that can be trained.

    With fewer elements, normalisation leaves only signs, and the gradient with respect to W is zero.
    """
    return 3 if is_centered(variant) else 2


def enc_weight(weight: Tensor, variant: str = "ws", alpha: float | Tensor = 1.0, kept: Tensor | None = None) -> Tensor:
    r"""Effective weight of an ENC layer, which has the squared Frobenius norm ``alpha``.

    .. math:: \lVert \hat W \rVert_F^2 = \alpha

    ==================  ==========================================================================
    ``'fro'``           eq. 20, :math:`\sqrt\alpha\, W / \lVert W \rVert_F`
    ``'wn'``            eq. 21, row j: :math:`\sqrt{\alpha/m}\, W_j / \lVert W_j \rVert`
    ``'ws'``            eq. 22, row j: :math:`\sqrt{\alpha/(mn)}\, (W_j - \bar W_j) / \mathrm{std}\, W_j`
    ``'centered_fro'``  eq. 23, :math:`\sqrt\alpha\, (W - \bar W) / \lVert W - \bar W \rVert_F`
    ==================  ==========================================================================

    with m rows (``out``), n columns (``weight[0].numel()``) and the population standard deviation. Statistics are
    computed in float32 or float64. In float32 they are accurate for weights of magnitude 1e-15 to 1e15
    (:func:`imprecise_rows` finds the others).

    Args:
        weight: Free weight W, ``(out, in)`` or ``(out, in / groups, *kernel)``, finite. If a row (whole-layer
            variants: the layer) is constant under ``'ws'`` or ``'centered_fro'``, or zero under ``'wn'`` or ``'fro'``,
            its result is NaN. :func:`enc_plugin.to_enc` raises for such layers, and ``audit`` reports them.
        variant: ``'fro'``, ``'wn'``, ``'ws'`` or ``'centered_fro'``.
        alpha: Squared Frobenius norm of the result, positive, below 1e30; a number, or a tensor of one element
            (learnable alpha).
        kept: Pruning mask shaped like ``weight``, with 1 for kept and 0 for pruned elements, or None. The result is 0
            where ``kept`` is 0. Elsewhere the equation holds for the kept elements of a row, and m is the number of
            rows with at least one kept element.

    Returns:
        Tensor of the shape, dtype and device of ``weight``.

    Raises:
        ValueError: If ``variant`` is unknown, ``weight`` is empty, has fewer than two dimensions or (under ``'ws'`` and
            ``'centered_fro'``) rows of one element, or the number ``alpha`` is out of range.
        TypeError: If ``weight`` is not a floating point tensor, or ``alpha`` is not a number.

    Example:
        >>> enc_weight(torch.tensor([[3.0, 4.0]]), "fro")
        tensor([[0.6000, 0.8000]])
    """
    check_variant(variant)
    check_weight(weight)
    check_alpha(alpha)
    rows = num_rows(weight, variant)
    w = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    if is_centered(variant) and w.numel() == rows:
        raise ValueError(
            f"weight: expected rows of at least two elements, got shape {tuple(weight.shape)}; {variant!r} turns "
            "rows of one element into 0 / 0, 'fro' does not"
        )
    if kept is not None:
        what = _of_kept(w, variant, alpha, kept)
    elif torch.compiler.is_compiling():
        what = _by_formula(w, variant, alpha)
    elif is_centered(variant):
        # One fused operation, which saves only W for the backward pass. The scale is its affine weight.
        w = w.reshape(1, weight.shape[0], -1)
        what = F.group_norm(w, rows, _scale(w, alpha, w.numel(), w.shape[1:2]), None, 0.0)
    else:
        what, _ = _UnitRows.apply(w.flatten(1).contiguous(), _scale(w, alpha, rows, (rows, 1)))
    return what.reshape(weight.shape).to(weight.dtype)


def _by_formula(w: Tensor, variant: str, alpha: float | Tensor) -> Tensor:
    """:func:`enc_weight` in elementary operations, which a compiler can fuse.

    The kernels that are fastest in eager mode cannot be fused: they need contiguous rows, but compiled convolutions
    use channels-last weights. ``lab/bench/compiled.py`` measures the difference.
    """
    rows = num_rows(w, variant)
    if is_centered(variant):
        w = w - _sums(w, variant) / (w.numel() // rows)
    scale = _scale(w, alpha, rows, (rows, *(1 for _ in w.shape[1:])))
    return w * (scale / _norms(w, scale))


def _of_kept(w: Tensor, variant: str, alpha: float | Tensor, kept: Tensor) -> Tensor:
    """:func:`enc_weight` of a pruned weight."""
    kept = kept.to(w.dtype)
    w, count = w * kept, _sums(kept, variant)
    if is_centered(variant):
        w = (w - _sums(w, variant) / count.clamp(min=1)) * kept
    # A fully pruned row stays 0. It is not divided by 0, because that would make its gradient NaN.
    norms = torch.where(count > 0, _norms(w, count), 1)
    scale = _scale(w, alpha, 1, (1,) * w.ndim) / (count > 0).sum().to(w.dtype).sqrt()
    return w * (scale / norms)


def _sums(w: Tensor, variant: str) -> Tensor:
    """Sums of the rows, ``(m, 1, ...)``; for the whole-layer variants the sum of the layer, ``(1, 1, ...)``."""
    sums = w.sum(tuple(range(1, w.ndim)), keepdim=True)
    # A layer is summed in two stages: a single float32 sum over millions of elements loses precision.
    return sums.sum(0, keepdim=True) if is_whole_layer(variant) else sums


@torch.no_grad()
def imprecise_rows(weight: Tensor, variant: str, kept: Tensor | None = None) -> Tensor:
    """Find the rows that :func:`enc_weight` cannot normalise accurately at its floating point precision.

    Such rows are zero, constant, constant up to rounding, or of a magnitude whose square overflows or underflows
    float32. The result for each row is compared with that of the row divided by its largest element, in float64.

    Args:
        weight, variant, kept: As in :func:`enc_weight`.

    Returns:
        Boolean tensor, ``(out,)`` (whole-layer variants: ``(1,)``): whether the effective weight of the row is not
        finite or has an error of more than 1 %.
    """
    rows = num_rows(weight, variant)
    w = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    v = weight.double() if kept is None else weight.double() * kept
    v = v / v.abs().reshape(rows, -1).amax(1).reshape(-1, *(1 for _ in v.shape[1:]))
    found, exact = (enc_weight(x, variant, 1.0, kept).double().reshape(rows, -1) for x in (w, v))
    precise = (found - exact).norm(dim=1) <= 0.01 * exact.norm(dim=1)  # false for NaN
    if is_centered(variant):
        # A float64 weight has no reference of higher precision, so its deviations from the mean must exceed rounding.
        deviations = v - _sums(v, variant) / (v.numel() // rows if kept is None else _sums(kept, variant))
        deviations = deviations if kept is None else deviations * kept
        spread, size = (x.reshape(rows, -1).norm(dim=1) for x in (deviations, v))
        precise &= spread > 64 * torch.finfo(w.dtype).eps * size
    if kept is not None:
        precise |= ~kept.reshape(rows, -1).bool().any(1)  # fully pruned rows are zero on purpose
    return ~precise


class _UnitRows(torch.autograd.Function):
    """``g_j v_j / ||v_j||`` for each row of ``v``, or ``g v / ||v||``; saves only v and the norms for backward.

    Rows are computed by the kernel behind torch's weight_norm. It sums a row in one stage, which loses precision if the
    row is a whole layer (relative error 1e-3 at 4096 x 4096). So the norm of a layer is computed as the norm of the row
    norms. ``torch._weight_norm`` is not used, because its second derivative is wrong: it treats the norms as constants.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if len(g) == len(v):
            return torch._weight_norm_interface(v, g, 0)
        norm = _norms(v, g)
        return v * (g / norm), norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def jvp(ctx: Any, v_tangent: Tensor, g_tangent: Tensor) -> tuple[Tensor, None]:
        v, g, _ = ctx.saved_tensors
        norms = _norms(v, g)  # recomputed, to be differentiable in v
        turn = (v * v_tangent).sum(1 if len(g) == len(v) else (0, 1), keepdim=True) / norms
        return v_tangent * (g / norms) + v * (g_tangent - g * turn / norms) / norms, None

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        v, g, norms = ctx.saved_tensors
        if torch.is_grad_enabled():
            norms = _norms(v, g)  # recomputed, to be differentiable in v
        elif len(g) == len(v):
            return torch.ops.aten._weight_norm_interface_backward(grad.contiguous(), v, g, norms, 0)
        grad_g = (grad * v).sum(1 if len(g) == len(v) else (0, 1), keepdim=True) / norms
        return (grad * (g / norms)).addcmul_(v, -g * grad_g / norms.square()), grad_g


def _norms(v: Tensor, g: Tensor) -> Tensor:
    """Norms of the rows of ``v`` if ``g`` has a factor for each, ``(m, 1, ...)``; else the norm of ``v``."""
    # vector_norm and not the root of a sum of squares, whose gradient would overflow or underflow earlier.
    norms = torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)
    return norms if len(g) == len(v) else torch.linalg.vector_norm(norms, dim=0, keepdim=True)


def check_alpha(alpha: float | Tensor) -> None:
    """Raise unless ``alpha`` is a positive number or a tensor of one element.

    The value of a tensor is not checked, because that would synchronize with the device.
    """
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1:
            raise ValueError(f"alpha: expected a number or a tensor of one element, got shape {tuple(alpha.shape)}")
    else:
        check_number("alpha", alpha, "a positive finite number", lambda value: 0 < value < MAX_ALPHA)


def check_alpha_option(alpha: float | str) -> None:
    """Raise unless ``alpha``, as an option of a layer, is a positive number or ``'learnable'``."""
    if isinstance(alpha, str) and alpha == "learnable":
        return
    expected = "a positive finite number or 'learnable'"
    if isinstance(alpha, str):
        raise ValueError(f"alpha: expected {expected}, got {alpha!r}")
    check_number("alpha", alpha, expected, lambda value: 0 < value < MAX_ALPHA)


def _scale(like: Tensor, alpha: float | Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    """``sqrt(alpha / count)`` as a tensor of ``shape``, with the dtype and device of ``like``."""
    if isinstance(alpha, Tensor):
        return (alpha.to(like.dtype) / count).sqrt().expand(shape).contiguous()
    return like.new_full(shape, (alpha / count) ** 0.5)
