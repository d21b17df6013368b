"""The ENC layers of torch's convolutions and linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .enc_layer import ENCLayer

# The stock class is a *direct* base of each layer, because mmengine's initialisers check the name of the class and of
# its direct bases only.


class _ENCConv(ENCLayer):
    plain_class: type[Any]

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the effective weight, then apply the post-norm if there is one."""
        return self._post_norm(self.plain_class._conv_forward(self, input, self._weight(), self.bias))


class ENCConv1d(_ENCConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with an ENC weight: input ``(N, C_in, L)``. See :class:`ENCConv2d`."""

    plain_class, norm_class = nn.Conv1d, nn.BatchNorm1d


class ENCConv2d(_ENCConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with an ENC weight: input ``(N, C_in, H, W)``, output ``(N, C_out, H', W')``.

    Args:
        *args, **kwargs: Arguments of the stock layer: channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype.
        variant: ``'ws'``, ``'wn'``, ``'fro'`` or ``'centered_fro'``, see :func:`enc_plugin.functional.enc_weight`.
        alpha: Squared Frobenius norm of the effective weight: a positive number, or ``'learnable'``.
        post_norm: Whether to append a batch norm to the layer (keys ``norm.*``).

    Raises:
        ValueError: If ``variant`` is unknown, ``alpha`` is not positive, or the rows of the weight are too short for
            ``variant``.

    Example:
        >>> layer = ENCConv2d(16, 32, kernel_size=3, padding=1)
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
        >>> round(layer.effective_weight.square().sum().item(), 5)
        1.0
    """

    plain_class, norm_class = nn.Conv2d, nn.BatchNorm2d


class ENCConv3d(_ENCConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with an ENC weight: input ``(N, C_in, D, H, W)``. See :class:`ENCConv2d`."""

    plain_class, norm_class = nn.Conv3d, nn.BatchNorm3d


class LinearPostNorm(ENCLayer):
    """ENC layer with outputs ``(*, out)``, which are reshaped to ``(N, out)`` for the post-norm."""

    def _post_norm(self, out: Tensor) -> Tensor:
        if self.enc_norm is None:
            return out
        rows = _to_rows(out)
        if isinstance(self.enc_norm, nn.BatchNorm2d):  # timm's convert_splitbn_model replaces any batch norm by one
            return _to_shape_of(out, super()._post_norm(rows[..., None, None]).flatten(1))
        return _to_shape_of(out, super()._post_norm(rows))


def _to_rows(out: Tensor) -> Tensor:
    return out if out.ndim == 2 else out.reshape(-1, out.shape[-1])


def _to_shape_of(out: Tensor, rows: Tensor) -> Tensor:
    return rows if out.ndim == 2 else rows.view_as(out)


# torch.fx records a call of each of these functions instead of tracing into it.
torch.fx.wrap("_to_rows")
torch.fx.wrap("_to_shape_of")


class ENCLinear(LinearPostNorm, nn.Linear):  # type: ignore[misc]  # torch declares `bias` without None
    """:class:`torch.nn.Linear` with an ENC weight: input ``(*, in)``, output ``(*, out)``. See :class:`ENCConv2d`.

    The post-norm normalises each output feature over all leading dimensions.
    """

    plain_class, norm_class = nn.Linear, nn.BatchNorm1d

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the effective weight, then apply the post-norm if there is one."""
        return self._post_norm(nn.functional.linear(input, self._weight(), self.bias))


StockLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

ENC_LAYERS: dict[type[nn.Module], type[ENCLayer]] = {
    cls.plain_class: cls for cls in (ENCConv1d, ENCConv2d, ENCConv3d, ENCLinear)
}
