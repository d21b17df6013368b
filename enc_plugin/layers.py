"""ENC layers: the stock layers with the same keys, computing with the effective weight of eq. 20-23."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional.weights import check_alpha, check_variant, enc_weight, is_centered


class ENCLayer(nn.Module):
    r"""What the ENC layers share: a free weight ``W`` that is optimised, and the effective weight used in its place.

    Every layer computes with :math:`\hat W`, :math:`\lVert\hat W\rVert_F^2 = \alpha`
    (:func:`enc_plugin.functional.enc_weight`). The parameters keep their stock names and shapes, so that stock
    checkpoints load. ``post_norm=True`` appends a batch norm (keys ``norm.*``) between the layer and whatever follows
    it; a checkpoint without those keys leaves the batch norm as it is. ``alpha='learnable'`` owns one more parameter,
    ``log_alpha`` (a scalar, 0 at the start), so that alpha stays positive.

    Args:
        variant: ``'ws'`` (eq. 22), ``'wn'`` (21), ``'fro'`` (20) or ``'centered_fro'`` (23).
        alpha: Squared Frobenius norm of the effective weight, a positive number or ``'learnable'``.
        post_norm: Whether a batch norm follows.
    """

    # The stock class that fold() goes back to, and the batch norm that fits its output: set by each subclass.
    plain_class: type[nn.Module]
    norm_class: type[nn.Module]

    def _init_enc(self, variant: str, alpha: float | str, post_norm: bool) -> None:
        """Turn an initialised stock layer into an ENC layer; consumes no random numbers and keeps every parameter."""
        check_variant(variant)
        self.variant = variant
        if alpha == "learnable":
            self.log_alpha = nn.Parameter(self.weight.new_zeros((), dtype=self._stat_dtype()))
        elif isinstance(alpha, str):
            raise ValueError(f"alpha: expected a positive number or 'learnable', got {alpha!r}")
        else:
            check_alpha(alpha)
            self.register_parameter("log_alpha", None)
            self._alpha = float(alpha)
        self.register_module("norm", None)
        if post_norm:
            self.add_post_norm()
        if is_centered(variant) and self.weight[0].numel() < 2 and (variant == "ws" or self.weight.numel() < 2):
            raise ValueError(
                f"weight: shape {tuple(self.weight.shape)} has rows of one element, which {variant!r} turns into "
                "0 / 0; use variant='wn' or 'fro' for this layer, or leave it out of ENC"
            )

    def add_post_norm(self) -> None:
        """Append a fresh batch norm (weight 1, bias 0); its ``norm.*`` keys join the state dict."""
        self.norm = self.norm_class(self.weight.shape[0], device=self.weight.device, dtype=self._stat_dtype())
        self.norm.train(self.training)

    def _stat_dtype(self) -> torch.dtype:
        # Half precision is for the arithmetic: batch norm statistics and a learnable alpha stay in float32.
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def alpha(self) -> float | Tensor:
        """Squared Frobenius norm of the effective weight: a number, or a scalar tensor when it is learnable."""
        return self._alpha if self.log_alpha is None else self.log_alpha.exp()

    @property
    def effective_weight(self) -> Tensor:
        """The weight that the layer computes with, shaped like ``weight`` (differentiable)."""
        return enc_weight(self.weight, self.variant, self.alpha)

    def _post_norm(self, out: Tensor) -> Tensor:
        return out if self.norm is None else self.norm(out)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A stock checkpoint knows no post-norm and no learnable alpha: keep ours instead of reporting missing keys.
        if f"{prefix}weight" in state_dict:
            own = {f"{prefix}norm.{k}": v for k, v in self.norm.state_dict().items()} if self.norm is not None else {}
            if not any(key in state_dict for key in own):
                state_dict.update(own)
            if self.log_alpha is not None:
                state_dict.setdefault(f"{prefix}log_alpha", self.log_alpha.detach())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The stock layer's settings, the variant and alpha."""
        alpha = "'learnable'" if self.log_alpha is not None else f"{self._alpha:g}"
        return f"{super().extra_repr()}, variant={self.variant!r}, alpha={alpha}"


class _ENCConv(ENCLayer):
    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the effective weight, then apply the post-norm if there is one."""
        return self._post_norm(self._conv_forward(input, self.effective_weight, self.bias))


# The stock class is a *direct* base of each layer: mmengine's initialisers find layers by class name or direct base.


class ENCConv1d(_ENCConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with an ENC weight: input ``(N, C_in, L)``. See :class:`ENCConv2d`."""

    plain_class, norm_class = nn.Conv1d, nn.BatchNorm1d

    def __init__(self, *args, variant: str = "ws", alpha: float | str = 1.0, post_norm: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self._init_enc(variant, alpha, post_norm)


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

    def __init__(self, *args, variant: str = "ws", alpha: float | str = 1.0, post_norm: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self._init_enc(variant, alpha, post_norm)


class ENCConv3d(_ENCConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with an ENC weight: input ``(N, C_in, D, H, W)``. See :class:`ENCConv2d`."""

    plain_class, norm_class = nn.Conv3d, nn.BatchNorm3d

    def __init__(self, *args, variant: str = "ws", alpha: float | str = 1.0, post_norm: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self._init_enc(variant, alpha, post_norm)


class ENCLinear(ENCLayer, nn.Linear):
    """:class:`torch.nn.Linear` with an ENC weight: input ``(*, in)``, output ``(*, out)``. See :class:`ENCConv2d`.

    The batch norm of ``post_norm`` normalises each output feature over all leading dimensions.
    """

    plain_class, norm_class = nn.Linear, nn.BatchNorm1d

    def __init__(self, *args, variant: str = "ws", alpha: float | str = 1.0, post_norm: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self._init_enc(variant, alpha, post_norm)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the effective weight, then apply the post-norm if there is one."""
        out = nn.functional.linear(input, self.effective_weight, self.bias)
        if self.norm is None or out.ndim == 2:
            return self._post_norm(out)
        return self._post_norm(out.reshape(-1, out.shape[-1])).view_as(out)


ENC_LAYERS: dict[type[nn.Module], type[ENCLayer]] = {
    cls.plain_class: cls for cls in (ENCConv1d, ENCConv2d, ENCConv3d, ENCLinear)
}
