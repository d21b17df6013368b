"""The ENC reparameterizations, eq. 20-23: free weight in, effective weight out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_floating_tensor, check_number

VARIANTS = {
    "fro": "eq. 20: the whole layer over its Frobenius norm",
    "wn": "eq. 21: every row over its norm (weight normalization)",
    "ws": "eq. 22: every row standardized (weight standardization)",
    "centered_fro": "eq. 23: the whole layer, zero mean, over its Frobenius norm",
}

MAX_ALPHA = 1e30  # its square root still has room in float32

# Eq. 20 is eq. 21, and eq. 23 is eq. 22, of a matrix with a single row: two equations serve all four variants.
_WHOLE_LAYER = ("fro", "centered_fro")
_CENTERED = ("ws", "centered_fro")


def check_variant(variant: str) -> None:
    """Raise ``ValueError`` unless ``variant`` names one of eq. 20-23."""
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")


def check_weight(weight: Tensor) -> None:
    """Refuse what is no floating point tensor with rows."""
    check_floating_tensor("weight", weight)
    if weight.ndim < 2:
        raise ValueError(
            f"weight: expected (out, in) or (out, in / groups, *kernel), got shape {tuple(weight.shape)}; "
            "a 1-D parameter has no rows to normalise"
        )
    if not weight.numel():
        raise ValueError(f"weight: expected at least one element, got shape {tuple(weight.shape)}")


def num_rows(weight: Tensor, variant: str) -> int:
    """Number of rows that are normalised on their own: 1 for the whole-layer variants, else ``out``."""
    return 1 if is_whole_layer(variant) else weight.shape[0]


def is_whole_layer(variant: str) -> bool:
    """Whether the layer as a whole is normalised (eq. 20 and 23), and not each row on its own."""
    return variant in _WHOLE_LAYER


def is_centered(variant: str) -> bool:
    """Whether the variant removes the mean (eq. 22 and 23)."""
    return variant in _CENTERED


def min_elements(variant: str) -> int:
    """Fewest elements of a row (whole-layer variants: of the layer) whose direction can turn.

    A row with one element fewer keeps a sign alone: the gradient of its effective weight is zero.
    """
    return 3 if is_centered(variant) else 2


def enc_weight(weight: Tensor, variant: str = "ws", alpha: float | Tensor = 1.0, kept: Tensor | None = None) -> Tensor:
    r"""Effective weight of an ENC layer: every layer gets squared Frobenius norm ``alpha`` (eq. 20-23).

    .. math:: \lVert \hat W \rVert_F^2 = \alpha

    ==================  ==========================================================================
    ``'fro'``           eq. 20, :math:`\sqrt\alpha\, W / \lVert W \rVert_F`
    ``'wn'``            eq. 21, row j: :math:`\sqrt{\alpha/m}\, W_j / \lVert W_j \rVert`
    ``'ws'``            eq. 22, row j: :math:`\sqrt{\alpha/(mn)}\, (W_j - \bar W_j) / \mathrm{std}\, W_j`
    ``'centered_fro'``  eq. 23, :math:`\sqrt\alpha\, (W - \bar W) / \lVert W - \bar W \rVert_F`
    ==================  ==========================================================================

    with m rows (``out``), n columns (``weight[0].numel()``) and the population standard deviation. Statistics are
    taken in float32 at least; in float32 they hold for weights of magnitude 1e-15 to 1e15
    (:func:`imprecise_rows` finds the others).

    Args:
        weight: Free weight W, ``(out, in)`` or ``(out, in / groups, *kernel)``, finite. A row (for the whole-layer
            variants: the layer) that is constant under the centered variants, or zero under the others, has no
            direction: the result is NaN there. :func:`enc_plugin.to_enc` refuses such layers, ``audit`` reports them.
        variant: ``'fro'``, ``'wn'``, ``'ws'`` or ``'centered_fro'``.
        alpha: Squared Frobenius norm of the result, positive, below 1e30; a number, or a tensor of one element
            (learnable alpha).
        kept: Pruning mask, shaped like ``weight``: 1 for the elements that take part, 0 for pruned ones, or None. The
            result is 0 where ``kept`` is 0. Elsewhere the equation holds for the kept elements of a row, with m the
            number of rows that keep any.

    Returns:
        Tensor of the shape, dtype and device of ``weight``.

    Raises:
        ValueError: If ``variant`` is unknown, ``weight`` is empty or has fewer than two dimensions, or rows of one
            element under a centered variant, or if the number ``alpha`` is not positive.
        TypeError: If ``weight`` is no floating point tensor, or ``alpha`` no number.

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
        # One fused op: statistics per group of rows, the scale as its affine weight, only W kept for backward.
        w = w.reshape(1, weight.shape[0], -1)
        what = F.group_norm(w, rows, _scale(w, alpha, w.numel(), w.shape[1:2]), None, 0.0)
    else:
        what, _ = _UnitRows.apply(w.flatten(1).contiguous(), _scale(w, alpha, rows, (rows, 1)))
    return what.reshape(weight.shape).to(weight.dtype)


def _by_formula(w: Tensor, variant: str, alpha: float | Tensor) -> Tensor:
    """:func:`enc_weight` in elementary operations, for compilers to fuse.

    They cannot fuse the kernels that are fastest on their own: those want rows one after the other in memory, where
    compiled convolutions want channels last. ``lab/bench/compiled.py`` has the difference, with timm's StdConv2d as
    such a kernel.
    """
    columns, rows = tuple(range(1, w.ndim)), num_rows(w, variant)
    if is_centered(variant):
        # Of a layer in two stages: one float32 sum over millions of elements costs digits.
        sums = w.sum(columns, keepdim=True)
        w = w - (sums.sum(0, keepdim=True) if is_whole_layer(variant) else sums) / (w.numel() // rows)
    scale = _scale(w, alpha, rows, (rows, *(1 for _ in columns)))
    return w * (scale / _norms(w, scale))


def _of_kept(w: Tensor, variant: str, alpha: float | Tensor, kept: Tensor) -> Tensor:
    """:func:`enc_weight` of the elements that ``kept`` marks."""
    rows = num_rows(w, variant)
    kept = kept.reshape(rows, -1).to(w.dtype)
    w, count = w.reshape(rows, -1) * kept, kept.sum(1, keepdim=True)
    if is_centered(variant):
        w = (w - w.sum(1, keepdim=True) / count.clamp(min=1)) * kept
    # A row that is pruned as a whole stays 0, without a division by 0 on the way (its gradient would be NaN).
    norms = torch.where(count > 0, torch.linalg.vector_norm(w, dim=1, keepdim=True), 1)
    scale = _scale(w, alpha, 1, (1, 1)) / (count > 0).sum().sqrt()
    return w * (scale / norms)


@torch.no_grad()
def imprecise_rows(weight: Tensor, variant: str, kept: Tensor | None = None) -> Tensor:
    """Find the rows that :func:`enc_weight` cannot normalise in the precision that it computes in.

    Such rows are constant or zero, nearly so (their differences drown in rounding), or of a magnitude whose square
    float32 cannot hold. Each row is compared with the equation in float64, for the row divided by its largest element.

    Args:
        weight: Free weight W, as in :func:`enc_weight`, finite.
        variant: As in :func:`enc_weight`.
        kept: As in :func:`enc_weight`.

    Returns:
        Truth values, one for each row (whole-layer variants: one): whether the effective weight is not finite or off by
        more than 1 %.
    """
    rows = num_rows(weight, variant)
    v = weight.double().reshape(rows, -1)
    kept = None if kept is None else kept.reshape(rows, -1)
    v = v if kept is None else v * kept
    v = v / v.abs().amax(1, keepdim=True)
    exact = enc_weight(v, variant, 1.0, kept)
    w = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    error = enc_weight(w.reshape(rows, -1), variant, 1.0, kept).double() - exact
    precise = error.norm(dim=1) <= 0.01 * exact.norm(dim=1)  # false for NaN
    if is_centered(variant):
        # In float64 there is nothing better to compare with: here the differences themselves have to be above rounding.
        mean = v.mean(1, keepdim=True) if kept is None else v.sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        spread = (v - mean if kept is None else (v - mean) * kept).norm(dim=1)
        precise &= spread > 64 * torch.finfo(w.dtype).eps * v.norm(dim=1)
    if kept is not None:
        precise |= ~kept.bool().any(1)  # pruned as a whole, on purpose
    return ~precise


class _UnitRows(torch.autograd.Function):
    """``g_j v_j / ||v_j||`` for the rows of ``v``, or ``g v / ||v||`` for all of it: keeps v and the norms alone.

    Rows take the kernel behind torch's weight_norm. It sums a row in float32 without a second stage, which costs digits
    where the row is a whole layer (1e-3 at 4096 x 4096), so there the norm is that of the row norms. And
    ``torch._weight_norm`` itself takes the norms as constants in its second derivative, which is therefore wrong.
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

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        v, g, norms = ctx.saved_tensors
        if torch.is_grad_enabled():
            norms = _norms(v, g)  # once more, as a function of v
        elif len(g) == len(v):
            return torch.ops.aten._weight_norm_interface_backward(grad.contiguous(), v, g, norms, 0)
        grad_g = (grad * v).sum(1 if len(g) == len(v) else (0, 1), keepdim=True) / norms
        return (grad * (g / norms)).addcmul_(v, -g * grad_g / norms.square()), grad_g


def _norms(v: Tensor, g: Tensor) -> Tensor:
    """Norms that go with the factors ``g``, ``(m, 1, ...)`` of the rows or ``(1, 1, ...)`` of all of ``v``."""
    # Not roots of sums of squares: the gradient of a norm keeps its range for very small and large weights.
    norms = torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)
    return norms if len(g) == len(v) else torch.linalg.vector_norm(norms, dim=0, keepdim=True)


def check_alpha(alpha: float | Tensor) -> None:
    """Raise ``ValueError`` for a number that is not positive; a tensor is not read (that would wait for the device)."""
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1:
            raise ValueError(f"alpha: expected a number or a tensor of one element, got shape {tuple(alpha.shape)}")
    else:
        check_number("alpha", alpha, "a positive finite number", lambda value: 0 < value < MAX_ALPHA)


def check_alpha_option(alpha: float | str) -> None:
    """Refuse what is neither a positive number nor ``'learnable'``: a layer's alpha, which is no tensor."""
    if isinstance(alpha, str) and alpha == "learnable":
        return
    expected = "a positive finite number or 'learnable'"
    if isinstance(alpha, str):
        raise ValueError(f"alpha: expected {expected}, got {alpha!r}")
    check_number("alpha", alpha, expected, lambda value: 0 < value < MAX_ALPHA)


def _scale(like: Tensor, alpha: float | Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    """``sqrt(alpha / count)`` as a tensor of ``shape``: the factor of a unit row, or of a row of unit variance."""
    if isinstance(alpha, Tensor):
        return (alpha.to(like.dtype) / count).sqrt().expand(shape).contiguous()
    return like.new_full(shape, (alpha / count) ** 0.5)
