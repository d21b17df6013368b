"""Merging of batch norms into weights: a batch norm's gain and shift, and a check against merging into ENC layers."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def running_statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a batch norm, each ``(C,)``.

    Raises:
        ValueError: If there are none: ``track_running_stats=False``, or another module has replaced the batch norm.
    """
    mean, var = (getattr(norm, name, None) for name in ("running_mean", "running_var"))
    if mean is None or var is None:
        raise ValueError(
            f"norm: expected a batch norm with running statistics, got a {type(norm).__name__} without running "
            "statistics, which cannot be merged into weights; train with track_running_stats=True, or convert with "
            "post_norm=False if no batch norm is wanted behind the layers"
        )
    return mean, var


def batch_norm_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Gain and shift, each ``(C,)`` in float64, of a batch norm in eval mode: ``y = gain * x + shift``.

    Raises:
        ValueError: If the batch norm has no running statistics and so no fixed gain.
    """
    mean, var = running_statistics(norm)
    gain = (var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    shift = -gain * mean.double()
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return gain, shift


@torch.no_grad()
def rows_are_rescaled(old: Tensor | None, new: Tensor) -> bool:
    """Whether each row of ``new`` is a multiple of the row of ``old``, with factors that are not all 1.

    mmcv's and torch's ``fuse_conv_bn`` assign such weights to a layer. Initialisation and casts do not.

    Args:
        old: Weight of the layer, ``(out, ...)``, or None.
        new: Weight that replaces it.
    """
    # Sharded (DTensor) and meta weights cannot be read here. Rows of one element are always multiples of each other.
    if old is None or new is old or type(old.data) is not type(new.data) or old.is_meta:
        return False
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device) or old[0].numel() == 1:
        return False
    tolerance = max(1e-5, 4 * torch.finfo(old.dtype).eps)  # rounding error of rescaled rows
    w, v = old.double().flatten(1), new.double().flatten(1)
    sq_norms = w.square().sum(1, keepdim=True)
    factor = torch.where(sq_norms > 0, (w * v).sum(1, keepdim=True) / sq_norms, 1)
    is_multiple = (v - factor * w).norm() <= tolerance * v.norm()
    return bool(is_multiple and (factor - 1).abs().max() > tolerance / 10)


class RefusesRescaledRows(nn.Module):
    """Base of layers that normalise the rows of their weight, before the stock class: using merged weights raises.

    Fusing a batch norm into the layer assigns the old weight with rescaled rows, whose scale it would normalise away.
    Loading with ``assign=True`` and the constructor may set any weight.
    """

    _instead = ""  # advice at the end of the error message

    def _normalises_rows(self) -> bool:
        """Whether the layer has been constructed and normalises its weight."""
        return True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._is_loading = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            del self._is_loading

    def __setattr__(self, name: str, value: Any) -> None:
        is_new = name == "weight" and isinstance(value, nn.Parameter) and "_is_loading" not in self.__dict__
        if is_new and self._normalises_rows() and rows_are_rescaled(self._parameters.get("weight"), value):
            raise ValueError(
                "weight: the new value is the old one with rescaled rows, as when a batch norm is fused into the "
                f"layer; {type(self).__name__} would normalise the scale away. {self._instead} (to set the weight "
                "anyway, copy the values into weight.data)"
            )
        super().__setattr__(name, value)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> NoReturn:
        """Raise, because only other modules call this method of convolutions, with a weight made from the free one.

        mmcv's ``ConvModule`` does so to merge a batch norm into the weight in each pass (``efficient_conv_bn_eval``).
        """
        raise ValueError(
            f"weight: another module convolves with a weight made from the free weight of this {type(self).__name__}, "
            f"which computes with the effective weight; turn efficient_conv_bn_eval off. {self._instead}"
        )
