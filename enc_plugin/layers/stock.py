"""The ENC layers of torch's own convolutions and linear layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .enc_layer import ENCLayer

# The stock class is a *direct* base of each layer: mmengine's initialisers find layers by class name or direct base.


class _ENCConv(ENCLayer):
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # the stock class's

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the effective weight, then apply the post-norm if there is one."""
        return self._post_norm(self._conv_forward(input, self._weight(), self.bias))


class ENCConv1d(_ENCConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with an ENC weight: input ``(N, C_in, L)``. See :class:`ENCConv2d`."""

    plain_class, norm_class = nn.Conv1d, nn.BatchNorm1d


class ENCConv2d(_ENCConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with an ENC weight: input ``(N, C_in, H, W)``, output ``(N, C_out, H', W')``.

    Args:
        *args, **kwargs: As for the stock layer: channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype.
        variant: ``'ws'`` (eq. 22, default), ``'wn'`` (21), ``'fro'`` (20) or ``'centered_fro'`` (23).
        alpha: Squared Frobenius norm of the effective weight: a positive number, or ``'learnable'``.
        post_norm: Append a batch norm of the layer's own (keys ``norm.*``).

    Raises:
        ValueError: If ``variant`` is unknown, ``alpha`` is not positive, or rows of one element meet ``'ws'``.

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
    """An ENC layer of outputs ``(*, out)``, while batch norms take ``(N, out)``."""

    def _post_norm(self, out: Tensor) -> Tensor:
        if self.enc_norm is None:
            return out
        return _to_shape_of(out, super()._post_norm(_to_rows(out)))


def _to_rows(out: Tensor) -> Tensor:
    return out if out.ndim == 2 else out.reshape(-1, out.shape[-1])


def _to_shape_of(out: Tensor, rows: Tensor) -> Tensor:
    return rows if out.ndim == 2 else rows.view_as(out)


# torch.fx is to record a call of each of these functions, and not to look inside.
torch.fx.wrap("_to_rows")
torch.fx.wrap("_to_shape_of")


class ENCLinear(LinearPostNorm, nn.Linear):  # type: ignore[misc]  # torch declares that linear layers have a bias
    """:class:`torch.nn.Linear` with an ENC weight: input ``(*, in)``, output ``(*, out)``. See :class:`ENCConv2d`.

    The batch norm of ``post_norm`` normalises each output feature over all leading dimensions.
    """

    plain_class, norm_class = nn.Linear, nn.BatchNorm1d

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the effective weight, then apply the post-norm if there is one."""
        return self._post_norm(nn.functional.linear(input, self._weight(), self.bias))


StockLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

ENC_LAYERS: dict[type[nn.Module], type[ENCLayer]] = {
    cls.plain_class: cls for cls in (ENCConv1d, ENCConv2d, ENCConv3d, ENCLinear)
}
