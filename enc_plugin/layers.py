"""ENC layers: the stock layers with the same keys, computing with the effective weight of eq. 20-23."""

from __future__ import annotations

import copy
import math
import warnings
from functools import cache

import torch
from torch import Tensor, nn

from .functional._checks import check_type
from .functional.weights import check_alpha_option, check_variant, enc_weight, is_centered


class CheckpointWarning(UserWarning):
    """A checkpoint was saved under other settings than those of the layers that load it."""


class ENCLayer(nn.Module):
    r"""What the ENC layers share: a free weight ``W`` that is optimised, and the effective weight used in its place.

    Every layer computes with :math:`\hat W`, :math:`\lVert\hat W\rVert_F^2 = \alpha`
    (:func:`enc_plugin.functional.enc_weight`). The parameters keep their stock names and shapes, so that stock
    checkpoints load. ``post_norm=True`` appends a batch norm (keys ``norm.*``) between the layer and whatever follows
    it; a checkpoint without those keys leaves the batch norm as it is. ``alpha='learnable'`` owns one more parameter,
    ``log_alpha`` (a scalar, 0 at the start), so that alpha stays positive.

    State dicts carry variant, alpha and post-norm in their metadata, not as keys: loading under other settings warns.

    Args:
        variant: ``'ws'`` (eq. 22), ``'wn'`` (21), ``'fro'`` (20) or ``'centered_fro'`` (23).
        alpha: Squared Frobenius norm of the effective weight, a positive number or ``'learnable'``.
        post_norm: Whether a batch norm follows.
    """

    # The stock class that fold() goes back to, and the batch norm that fits its output: set by each subclass.
    plain_class: type[nn.Module]
    norm_class: type[nn.Module]

    # Whether the weight was last loaded from a plain network; and whether that is made good, so that no warning is due.
    holds_plain_weight = False
    keeps_function = False

    def _init_enc(self, variant: str, alpha: float | str, post_norm: bool) -> None:
        """Turn an initialised stock layer into an ENC layer; consumes no random numbers and keeps every parameter."""
        check_variant(variant)
        check_alpha_option(alpha)
        check_type("post_norm", post_norm, bool, "True or False")
        self.variant = variant
        if alpha == "learnable":
            self.log_alpha = nn.Parameter(self.weight.new_zeros((), dtype=self._stat_dtype()))
        else:
            self.register_parameter("log_alpha", None)
            self._alpha = float(alpha)
        self.register_module("norm", None)
        if post_norm:
            self.add_post_norm()
        if is_centered(variant) and self.weight[0].numel() < 2 and (variant == "ws" or self.weight.numel() < 2):
            raise ValueError(
                f"weight: shape {tuple(self.weight.shape)} has rows of one element, which {variant!r} turns into "
                "0 / 0; use variant='fro' for this layer, or leave it out of ENC"
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
        if self.norm is None:
            return out
        # SyncBatchNorm has the values of other processes too.
        if self.norm.training and out.numel() == out.shape[1] and not isinstance(self.norm, nn.SyncBatchNorm):
            raise ValueError(
                f"input: this {type(self).__name__} has a batch norm of its own (post_norm), which in train mode needs "
                f"more than one value for each output, got an output of shape {tuple(out.shape)}: use batches of at "
                "least two samples (drop_last=True leaves out a last batch of one), post_norm=False, or model.eval()"
            )
        return self.norm(out)

    @property
    def settings(self) -> dict[str, str | float | bool]:
        """``variant``, ``alpha`` (a number or ``'learnable'``) and ``post_norm``, as the constructor takes them."""
        alpha = "learnable" if self.log_alpha is not None else self._alpha
        return {"variant": self.variant, "alpha": alpha, "post_norm": self.norm is not None}

    def fuse(self) -> nn.Module:
        """The stock layer that computes the same in eval mode, as timm's ``reparameterize_model`` asks for it.

        Returns:
            A new layer of the stock class: the effective weight, with the post-norm merged into weight and bias.
        """
        plain = copy.deepcopy(self)
        plain.become_plain()
        return plain

    @torch.no_grad()
    def become_plain(self) -> None:
        """Turn into the stock layer of :meth:`fuse`, in place; hooks and references stay valid."""
        weight, bias, like = self.effective_weight, self.bias, self.weight
        if self.norm is not None:
            gain, shift = batch_norm_affine(self.norm)
            weight = weight.double() * gain.reshape(-1, *[1] * (weight.ndim - 1))
            bias = shift if bias is None else shift + gain * bias.double()
        for name in ("norm", "log_alpha"):
            delattr(self, name)
        for name in ("variant", "_alpha", "holds_plain_weight", "keeps_function"):
            self.__dict__.pop(name, None)
        self.__class__ = self.plain_class
        # New parameters: a weight that is tied to another layer's must not change there.
        self.weight = nn.Parameter(weight.to(like.dtype), requires_grad=like.requires_grad)
        if bias is not self.bias:
            self.bias = nn.Parameter(bias.to(like.dtype), requires_grad=like.requires_grad)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside the module's version number: no key of its own, so that the checkpoint still loads anywhere.
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})["enc"] = self.settings

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        # A stock checkpoint knows no post-norm and no learnable alpha: keep ours instead of reporting missing keys.
        if f"{prefix}weight" in state_dict:
            own = {f"{prefix}norm.{k}": v for k, v in self.norm.state_dict().items()} if self.norm is not None else {}
            saved = local_metadata.get("enc")
            has_norm = any(key in state_dict for key in own)
            self._check_origin(saved, "version" in local_metadata and not has_norm)
            self.holds_plain_weight = saved is None and not has_norm
            if not has_norm:
                state_dict.update(own)
            if self.log_alpha is not None:
                start = self.log_alpha.detach()
                if saved is not None and saved["alpha"] != "learnable":
                    start = torch.full_like(start, math.log(saved["alpha"]))
                state_dict.setdefault(f"{prefix}log_alpha", start)
        self._is_loading = True  # assign=True sets the weight as an attribute
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        finally:
            del self._is_loading

    def _check_origin(self, saved: dict | None, is_plain: bool) -> None:
        """Warn if a checkpoint comes from other settings; one text for all layers, so that Python shows it once."""
        own = self.settings
        if saved is None and is_plain and not self.keeps_function:
            warnings.warn(
                "the checkpoint is of a plain network: ENC layers normalise its weights, so the outputs differ until "
                "the network is trained; to_enc(model, preserve=True) keeps them, enc=dict(preserve=True) in a config",
                CheckpointWarning,
                stacklevel=2,
            )
        if saved is not None and own["alpha"] == "learnable":
            own["alpha"] = saved["alpha"]  # a learnable alpha takes up any value
        if saved is not None and saved != own:
            differ = [key for key in own if saved.get(key) != own[key]]
            warnings.warn(
                "the checkpoint is of an ENC network with "
                + ", ".join(f"{key}={saved.get(key)!r}" for key in differ)
                + ", this one has "
                + ", ".join(f"{key}={own[key]!r}" for key in differ)
                + ": the free weights load, but the outputs differ",
                CheckpointWarning,
                stacklevel=2,
            )

    def __setattr__(self, name, value):
        if name == "weight" and isinstance(value, nn.Parameter) and self._is_rescaled(value):
            raise ValueError(
                "weight: the new value is the old one with rescaled rows, as when a batch norm is fused into the "
                f"layer; {type(self).__name__} would normalise the scale away. Call enc_plugin.fold(model) first and "
                "fuse the plain model that it returns (to set the weight, copy into weight.data)"
            )
        super().__setattr__(name, value)

    def _is_rescaled(self, new: Tensor) -> bool:
        # A layer that is being made or loaded takes any weight.
        if "variant" not in self.__dict__ or "_is_loading" in self.__dict__:
            return False
        return rows_are_rescaled(self._parameters.get("weight"), new)

    def extra_repr(self) -> str:
        """The stock layer's settings, the variant and alpha."""
        alpha = "'learnable'" if self.log_alpha is not None else f"{self._alpha:g}"
        return f"{super().extra_repr()}, variant={self.variant!r}, alpha={alpha}"


@torch.no_grad()
def rows_are_rescaled(old: Tensor | None, new: Tensor) -> bool:
    """Whether each row of ``new`` is a multiple of ``old``'s, with factors that are not all 1.

    It is what mmcv's and torch's ``fuse_conv_bn`` assign to a layer's weight. Other weights (initialisation, casts) are
    not of that form.

    Args:
        old: Weight of the layer, ``(out, ...)``, or None.
        new: Weight that is to take its place.
    """
    # Sharded (DTensor) and meta weights cannot be read here; of rows of one element nothing can be told.
    if old is None or new is old or type(old.data) is not type(new.data) or old.is_meta:
        return False
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device) or old[0].numel() == 1:
        return False
    tolerance = max(1e-5, 4 * torch.finfo(old.dtype).eps)  # what rounding the rescaled rows leaves
    w, v = old.double().flatten(1), new.double().flatten(1)
    factor = (w * v).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
    is_multiple = (v - factor * w).norm() <= tolerance * v.norm()
    return bool(is_multiple and (factor - 1).abs().max() > tolerance / 10)


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


class _ENCLinear(ENCLayer):
    def _post_norm(self, out: Tensor) -> Tensor:
        if self.norm is None or out.ndim == 2:
            return super()._post_norm(out)
        return super()._post_norm(out.reshape(-1, out.shape[-1])).view_as(out)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the effective weight, then apply the post-norm if there is one."""
        return self._post_norm(nn.functional.linear(input, self.effective_weight, self.bias))


class ENCLinear(_ENCLinear, nn.Linear):
    """:class:`torch.nn.Linear` with an ENC weight: input ``(*, in)``, output ``(*, out)``. See :class:`ENCConv2d`.

    The batch norm of ``post_norm`` normalises each output feature over all leading dimensions.
    """

    plain_class, norm_class = nn.Linear, nn.BatchNorm1d

    def __init__(self, *args, variant: str = "ws", alpha: float | str = 1.0, post_norm: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self._init_enc(variant, alpha, post_norm)


ENC_LAYERS: dict[type[nn.Module], type[ENCLayer]] = {
    cls.plain_class: cls for cls in (ENCConv1d, ENCConv2d, ENCConv3d, ENCLinear)
}


def saved_settings(state_dict: dict[str, Tensor]) -> dict[str, dict[str, str | float | bool]] | None:
    """What the ENC layers of a checkpoint were, by name; None if its state dict has lost its metadata.

    Args:
        state_dict: As of :meth:`torch.nn.Module.state_dict`; of a plain network, the result is empty.
    """
    metadata = getattr(state_dict, "_metadata", None)
    if not metadata:
        return None
    return {
        name.removeprefix("module."): module["enc"]
        for name, module in metadata.items()
        if isinstance(module, dict) and "enc" in module
    }


class _ENCSubclass(ENCLayer):
    """Base of the ENC classes that :func:`enc_class` derives from subclasses of the stock layers."""

    def forward(self, *args, **kwargs) -> Tensor:
        """Run the stock class's own forward on the effective weight, then the post-norm if there is one."""
        return self._post_norm(self.forward_with(self.effective_weight, *args, **kwargs))

    def forward_with(self, weight: Tensor, *args, **kwargs) -> Tensor:
        """The stock class's own forward with ``weight`` in the place of the layer's."""
        # The stock forward sees this module as it will be after fold: its class, its attributes, another weight.
        stock = object.__new__(self.plain_class)
        stock.__dict__ = {**self.__dict__, "_parameters": {**self._parameters, "weight": weight}}
        return self.plain_class.forward(stock, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        # Pickle cannot import a class that was made at run time; it is made again from the stock class.
        return _new_subclass_layer, (self.plain_class,), self.__dict__


class _ENCSubclassLinear(_ENCSubclass, _ENCLinear):
    pass


def enc_class(plain_class: type[nn.Module]) -> type[ENCLayer] | None:
    """The ENC class of a stock layer class or of a subclass of one; None for classes that are neither.

    Subclasses (mmcv's wrappers, timm's ``Conv2dSame``, ...) keep their own forward, which sees the effective weight.
    """
    return ENC_LAYERS.get(plain_class) or _derive_enc_class(plain_class)


@cache
def _derive_enc_class(plain_class: type[nn.Module]) -> type[ENCLayer] | None:
    stock = next((base for base in ENC_LAYERS if issubclass(plain_class, base)), None)
    if stock is None or issubclass(plain_class, ENCLayer):
        return None
    own = _ENCSubclassLinear if stock is nn.Linear else _ENCSubclass
    # The bases of the stock class are direct bases too, for mmengine's initialisers (see above).
    return type(
        f"ENC{plain_class.__name__}",
        (own, plain_class, *plain_class.__bases__),
        {
            "plain_class": plain_class,
            "norm_class": ENC_LAYERS[stock].norm_class,
            "__doc__": f":class:`{plain_class.__module__}.{plain_class.__qualname__}` with an ENC weight.",
            "__module__": __name__,
        },
    )


def _new_subclass_layer(plain_class: type[nn.Module]) -> ENCLayer:
    return object.__new__(_derive_enc_class(plain_class))
