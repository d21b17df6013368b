"""The ENC reparameterizations of many layers in one batch of operations.

Computing a layer's weight takes several operations. On a GPU, launching them costs the host the same time for one layer
as for all layers, so a network of small layers is limited by the host. Here, layers whose rows have the same length
form a *group*, which is computed as one matrix. So the number of operations depends on the number of different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .weights import enc_weight, is_centered, is_whole_layer, num_rows

# The variants that this module implements for groups. Any other variant is computed layer by layer.
GROUPED = ("fro", "wn", "ws", "centered_fro")

_BLOCK = 2**16  # elements: three blocks in float32, of weights, gradients and terms, fit into an L2 cache of 1 MB


def enc_weights(
    weights: Sequence[Tensor], variant: str, alphas: Sequence[float | Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """:func:`~enc_plugin.functional.enc_weight` of many layers, equal to it up to rounding.

    Weights in channels_last format are not copied to contiguous format, because the statistics do not depend on the
    order of elements within a row.

    Args:
        weights: Free weights with the same device and floating point dtype, each as in ``enc_weight``.
        variant: Variant of all layers, as in ``enc_weight``.
        alphas: Squared norm of each effective weight: numbers, or tensors of one element (learnable alphas).
        dtype: Dtype of the results; None: that of the weights. Casting to the dtype of autocast here takes one
            operation instead of one for each layer.

    Returns:
        The effective weights, each with the shape and memory format of its free weight. They are views of shared
        memory. They are differentiable with respect to weights and alphas, any number of times. The weights must not
        change before the backward pass.
    """
    if variant not in GROUPED:
        pairs = zip(weights, alphas, strict=True)
        return [enc_weight(weight, variant, alpha).to(dtype or weight.dtype) for weight, alpha in pairs]
    found: dict[int, Tensor] = {}
    for members in groups_of(weights, variant):
        own = [weights[i] for i in members]
        scale = factors(own, variant, [alphas[i] for i in members])
        found |= zip(members, _Group.apply(variant, dtype or own[0].dtype, scale, *own), strict=True)
    return [found[i] for i in range(len(weights))]


def groups_of(weights: Sequence[Tensor], variant: str) -> list[list[int]]:
    """Indices of the weights of each group: same row length, or same shape for the whole-layer variants."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, weight in enumerate(weights):
        shape = matrix_shape(weight)
        groups.setdefault(shape if is_whole_layer(variant) else shape[1:], []).append(i)
    return list(groups.values())


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Number of rows, and of elements in a row."""
    return len(weight), weight.numel() // len(weight)


def rows_of(weight: Tensor) -> Tensor:
    """``(out, n)`` view with the elements of each row in memory order; a copy if rows are not contiguous in memory."""
    m, n = matrix_shape(weight)
    return weight.as_strided((m, n), (n, 1)) if has_whole_rows(weight) else weight.reshape(m, n).contiguous()


def blocks_of(weight: Tensor, variant: str) -> tuple[Tensor, ...]:
    """Blocks of rows, as views, that fit into a CPU's cache; the whole weight if rows are strided or it is one row."""
    if is_whole_layer(variant) or not has_whole_rows(weight):
        return (weight,)
    return rows_of(weight).split(max(1, _BLOCK * len(weight) // weight.numel()))


def has_whole_rows(tensor: Tensor) -> bool:
    """Whether the rows are stored one after the other without gaps: in contiguous or channels_last format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.is_contiguous() or (
        tensor.ndim in formats and tensor.is_contiguous(memory_format=formats[tensor.ndim])
    )


def rows_of_gradient(grad: Tensor | None, weight: Tensor) -> Tensor:
    """The gradient as rows with the same order of elements as :func:`rows_of` the weight; zeros for None."""
    if grad is None:
        return weight.new_zeros(matrix_shape(weight))
    if not has_whole_rows(weight):
        return grad.reshape(matrix_shape(weight)).contiguous()
    m, n = matrix_shape(weight)
    return in_order_of(weight, grad).as_strided((m, n), (n, 1))


def in_order_of(weight: Tensor, grad: Tensor) -> Tensor:
    """``grad`` with its elements in memory as those of ``weight``; a copy if they are not."""
    if grad.stride() == weight.stride():
        return grad
    pairs = zip(grad.shape, grad.stride(), weight.stride(), strict=True)
    if all(a == b for size, a, b in pairs if size > 1):  # the strides of a 1 x 1 convolution have no meaning
        return grad
    return torch.empty_strided(weight.shape, weight.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)


def in_layouts_of(weights: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Split ``rows``, the concatenated rows of all weights, into views with the shape and strides of each weight."""
    views, start = [], 0
    for weight in weights:
        part = rows.as_strided((weight.numel(),), (1,), start)
        whole = has_whole_rows(weight)
        views.append(part.as_strided(weight.shape, weight.stride(), start) if whole else part.view(weight.shape))
        start += weight.numel()
    return views


def gathered(rows: Sequence[Tensor], variant: str) -> Tensor:
    """Rows of a group as one matrix, or ``(layers, m, n)`` for the whole-layer variants; float32 or float64."""
    x = torch.cat(list(rows)) if len(rows) > 1 else rows[0]
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return x.reshape(len(rows), *rows[0].shape) if is_whole_layer(variant) else x


def factors(weights: Sequence[Tensor], variant: str, alphas: Sequence[float | Tensor]) -> Tensor:
    """Factors of the normalised rows (whole-layer variants: layers) that give each layer its squared norm."""
    like = weights[0]
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    rows = tuple(num_rows(weight, variant) for weight in weights)
    counts = [_divisor(weight, variant) for weight in weights]
    if any(isinstance(alpha, Tensor) for alpha in alphas):
        tensors = [a if isinstance(a, Tensor) else like.new_full((), a, dtype=dtype) for a in alphas]
        return torch.cat([(a.to(dtype) / c).sqrt().expand(m) for a, c, m in zip(tensors, counts, rows, strict=True)])
    values = tuple(float((alpha / count) ** 0.5) for alpha, count in zip(alphas, counts, strict=True))
    return (_filled if is_recorded(like.device) else _kept)(values, rows, dtype, like.device)


def is_recorded(device: torch.device) -> bool:
    """Whether operations are recorded, by the compiler or as a CUDA graph, to run later.

    A tensor made now has no values before that, so it must not be kept, and nothing may be copied or awaited.
    """
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _divisor(weight: Tensor, variant: str) -> int:
    """Squared norm of a layer whose rows have unit norm (``'wn'``) or variance (``'ws'``); 1 for whole layers."""
    if is_whole_layer(variant):
        return 1
    return weight.numel() if is_centered(variant) else len(weight)


def _filled(values: tuple[float, ...], repeats: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # torch.full and not torch.tensor, which would synchronize to copy from the host.
    return torch.cat([torch.full((m,), v, dtype=dtype, device=device) for v, m in zip(values, repeats, strict=True)])


@lru_cache(maxsize=512)
def _kept(*args: Any) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # autograd cannot save inference tensors
        return _filled(*args)


def normalized(x: Tensor, variant: str, scale: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Effective weights of the free weights ``x`` (:func:`gathered`), and statistics for the backward pass.

    Args:
        x: ``(rows, n)``, or ``(layers, m, n)`` for the whole-layer variants; float32 or float64.
        variant: As in :func:`enc_weights`.
        scale: ``(rows,)`` or ``(layers,)``, see :func:`factors`.
    """
    if variant == "ws":
        rows, n = x.shape
        what, mean, rstd = torch.native_group_norm(x[None], scale, None, 1, rows, n, rows, 0.0)
        return what[0], (mean, rstd)
    if variant == "wn":
        what, norms = torch._weight_norm_interface(x, scale[:, None], 0)
        return what, (norms,)
    # In two stages: a single float32 sum over millions of elements loses precision.
    means = [x.sum(2).sum(1)[:, None, None] / x[0].numel()] if is_centered(variant) else []
    centered = x - means[0] if means else x
    norms = torch.linalg.vector_norm(torch.linalg.vector_norm(centered, dim=2), dim=1)[:, None, None]
    return centered * (scale[:, None, None] / norms), (norms, *means)


def pulled_back(
    grad: Tensor, x: Tensor, variant: str, scale: Tensor, stats: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Backward pass of :func:`normalized`: gradients with respect to ``x`` and ``scale``."""
    if variant == "ws":
        d_x, d_scale, _ = torch.ops.aten.native_group_norm_backward(
            grad[None], x[None], *stats, scale, 1, *x.shape, len(x), [True, True, False]
        )
        return d_x[0], d_scale
    if variant == "wn":
        d_x, d_scale = torch.ops.aten._weight_norm_interface_backward(grad, x, scale[:, None], *stats, 0)
        return d_x, d_scale[:, 0]
    norms, *mean = stats
    centered = x - mean[0] if mean else x
    dots = (grad * centered).sum(2).sum(1)[:, None, None] / norms
    d_x = (grad - centered * (dots / norms)) * (scale[:, None, None] / norms)
    if mean:
        d_x -= d_x.sum(2).sum(1)[:, None, None] / d_x[0].numel()
    return d_x, dots[:, 0, 0]


def computed(
    weights: Sequence[Tensor], variant: str, scale: Tensor, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """:func:`enc_weights` of one group without autograd, and the statistics for the backward pass."""
    what, stats = normalized(gathered([rows_of(weight) for weight in weights], variant), variant, scale)
    return in_layouts_of(weights, what.to(dtype or weights[0].dtype)), stats


class _Group(torch.autograd.Function):
    """Autograd function of :func:`enc_weights` for one group."""

    @staticmethod
    def forward(ctx: Any, variant: str, dtype: torch.dtype, scale: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        whats, stats = computed(weights, variant, scale, dtype)
        keep_for_backward(ctx, variant, scale, weights, stats)
        return tuple(whats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if needs_own_gradients(ctx, grads):
            return None, None, *own_gradients(ctx, grads)
        x = gathered([rows_of(w) for w in ctx.weights], ctx.variant)
        rows = [rows_of_gradient(grad, weight) for grad, weight in zip(grads, ctx.weights, strict=True)]
        grad = gathered(rows, ctx.variant).to(x.dtype)
        d_x, d_scale = pulled_back(grad, x, ctx.variant, ctx.scale, ctx.stats)
        d_weights = in_layouts_of(ctx.weights, d_x.to(ctx.weights[0].dtype))
        wanted = (None if grad is None else d for grad, d in zip(grads, d_weights, strict=True))
        return None, None, d_scale if ctx.needs_input_grad[2] else None, *wanted


def keep_for_backward(
    ctx: Any, variant: str, scale: Tensor, weights: Sequence[Tensor], stats: tuple[Tensor, ...]
) -> None:
    """Store tensors for the backward pass of a group as attributes of ``ctx``.

    ``save_for_backward`` is not used, because the first backward pass frees what it saved. If two outputs of a network
    use different layers of a group, each output may have its own backward pass.
    """
    ctx.set_materialize_grads(False)
    ctx.variant, ctx.scale, ctx.weights, ctx.stats = variant, scale, weights, stats
    ctx.versions = [None if weight.is_inference() else weight._version for weight in weights]


def needs_own_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> bool:
    """Whether the backward pass needs :func:`own_gradients`: if it is differentiated, or runs under ``torch.func``.

    Raises:
        RuntimeError: If a weight with a gradient was changed in place after the forward pass, as torch's own
            operations raise.
    """
    for weight, version, grad in zip(ctx.weights, ctx.versions, grads, strict=True):
        if grad is not None and version is not None and weight._version != version:
            raise RuntimeError(
                f"a weight of shape {tuple(weight.shape)} that is needed for gradient computation has been modified by "
                "an inplace operation between forward and backward pass; run the backward pass before changing weights"
            )
    return torch.is_grad_enabled() or torch._C._functorch.maybe_current_level() is not None


def own_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of ``scale`` and the weights, computed layer by layer and differentiable."""
    create_graph = torch.is_grad_enabled()
    of_scale: Tensor | None = None
    of_weights: list[Tensor | None] = []
    row = 0
    for weight, grad in zip(ctx.weights, grads, strict=True):
        first, row = row, row + num_rows(weight, ctx.variant)
        if grad is None:
            of_weights.append(None)
            continue
        with torch.enable_grad():
            # This alpha makes the factor of the rows 1. They are then multiplied by their own, which may be learnable.
            unit = enc_weight(weight, ctx.variant, float(_divisor(weight, ctx.variant)))
            what = (unit * ctx.scale[first]).to(grad.dtype)
        inputs = [x for x in (weight, ctx.scale) if x.requires_grad]
        found = dict(
            zip(map(id, inputs), torch.autograd.grad(what, inputs, grad, create_graph=create_graph), strict=True)
        )
        of_weights.append(found.get(id(weight)))
        if id(ctx.scale) in found:
            of_scale = found[id(ctx.scale)] if of_scale is None else of_scale + found[id(ctx.scale)]
    return [of_scale, *of_weights]
