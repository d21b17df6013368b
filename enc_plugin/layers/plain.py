"""Batch norms merged into weights: the gain and shift that one is, and whether a weight has had one merged into it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def batch_norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Gain and shift, each ``(C,)`` in float64, of a batch norm in eval mode: ``y = gain * x + shift``.

    Raises:
        ValueError: If the batch norm keeps no running statistics and so has no fixed gain.
    """
    if norm.running_mean is None:
        raise ValueError(
            "norm: a batch norm without running statistics normalises each batch by its own and cannot be merged; "
            "train with track_running_stats=True"
        )
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    shift = -gain * norm.running_mean.double()
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return gain, shift


@torch.no_grad()
def rows_are_rescaled(old: Tensor | None, new: Tensor) -> bool:
    """Whether each row of ``new`` is a multiple of ``old``'s, with factors that are not all 1.

    mmcv's and torch's ``fuse_conv_bn`` assign such weights to a layer. Initialisation and casts give no such weights.

    Args:
        old: Weight of the layer, ``(out, ...)``, or None.
        new: Weight that is to take its place.
    """
    # Sharded (DTensor) and meta weights cannot be read here; rows of one element are always multiples of each other.
    if old is None or new is old or type(old.data) is not type(new.data) or old.is_meta:
        return False
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device) or old[0].numel() == 1:
        return False
    tolerance = max(1e-5, 4 * torch.finfo(old.dtype).eps)  # what rounding the rescaled rows leaves
    w, v = old.double().flatten(1), new.double().flatten(1)
    factor = (w * v).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
    is_multiple = (v - factor * w).norm() <= tolerance * v.norm()
    return bool(is_multiple and (factor - 1).abs().max() > tolerance / 10)
