"""ENC layers: the stock layers with the same keys, computing with the effective weight of eq. 20-23."""

from __future__ import annotations

import copy
import inspect
import math
from functools import cache

import torch
from torch import Tensor, nn

from .forward_pass import weight_in_pass
from .functional.checks import check_type
from .functional.normalizable import check_normalizable, check_row_length
from .functional.weights import check_alpha_option, check_variant, enc_weight
from .origin import KEY, UNKNOWN, read_settings, warn_of_origin, write_settings
from .reparametrized import WEIGHT_KEYS, free_weights, remove_reparametrizations

# Symbolic tracing (torch.fx) records a call of each of these functions, and does not look inside.
torch.fx.wrap("enc_weight")
torch.fx.wrap("_to_rows")
torch.fx.wrap("_to_shape_of")


class _YieldingAttribute:
    """Public name of one of an ENC layer's own attributes: a subclass's attribute of the same name comes first.

    Python itself looks into the instance's ``__dict__`` first, because this descriptor defines no ``__set__``.
    """

    def __init__(self, own: str, doc: str):
        self.own, self.__doc__ = own, doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: nn.Module | None, owner: type | None = None):
        if layer is None:
            return self
        for registered in (layer._parameters, layer._buffers, layer._modules):
            if self.name in registered:
                return registered[self.name]
        return getattr(layer, self.own)


# Name of the post-norm among the submodules: the first that a subclass has not taken.
POST_NORM_KEYS = ("norm", "post_norm")


class ENCLayer(nn.Module):
    r"""What the ENC layers share: a free weight ``W`` that is optimised, and the effective weight used in its place.

    Every layer computes with :math:`\hat W`, :math:`\lVert\hat W\rVert_F^2 = \alpha`
    (:func:`enc_plugin.functional.enc_weight`). The parameters keep their stock names and shapes, so that stock
    checkpoints load. ``post_norm=True`` appends a batch norm (keys ``norm.*``) between the layer and whatever follows
    it; a checkpoint without those keys leaves the batch norm as it is. ``alpha='learnable'`` owns one more parameter,
    ``log_alpha`` (a scalar, 0 at the start), so that alpha stays positive.

    State dicts hold the settings of each layer beside its tensors (:meth:`get_extra_state`). Loading those of another
    layer warns. Stock checkpoints load into ENC layers, strictly too; the other way round, the settings are a key that
    stock layers do not expect, because they would compute with W.

    Args:
        variant: ``'ws'`` (eq. 22), ``'wn'`` (21), ``'fro'`` (20) or ``'centered_fro'`` (23).
        alpha: Squared Frobenius norm of the effective weight, a positive number or ``'learnable'``.
        post_norm: Whether a batch norm follows.
    """

    # The stock class that fold() goes back to, and the batch norm that fits its output: set by each subclass.
    plain_class: type[nn.Module]
    norm_class: type[nn.Module]

    # Settings of the layer that the weights were last loaded from: {} for a plain one, None before anything is loaded.
    loaded_settings: dict | None = None
    # Whether the function of plain weights is kept after loading (preserve), so that no warning is due.
    keeps_function = False

    # Own attributes have names that no subclass of the stock layers uses. Internal code reads these, not the public
    # names below, which may be a subclass's own.
    enc_variant: str
    _enc_alpha: float | None = None  # None: learnable
    _enc_norm_name: str | None = None  # key of the post-norm among the submodules
    _enc_norm_frozen = False  # because the layer was, when it got the norm

    variant = _YieldingAttribute("enc_variant", "Variant of the ENC equation: ``'ws'``, ``'wn'``, ...")
    alpha = _YieldingAttribute("enc_alpha", "Squared Frobenius norm of the effective weight: a number or a tensor.")
    log_alpha = _YieldingAttribute("enc_log_alpha", "Logarithm of a learnable alpha, or None.")
    norm = _YieldingAttribute("enc_norm", "The layer's own batch norm, or None.")
    settings = _YieldingAttribute("enc_settings", "``variant``, ``alpha`` and ``post_norm``, as the constructor takes.")

    def _init_enc(self, variant: str, alpha: float | str, post_norm: bool) -> None:
        """Turn an initialised stock layer into an ENC layer; consumes no random numbers and keeps every parameter."""
        check_variant(variant)
        check_alpha_option(alpha)
        check_type("post_norm", post_norm, bool, "True or False")
        check_row_length(self.weight, variant)
        self.enc_variant = variant
        self._enc_alpha = None if alpha == "learnable" else float(alpha)
        if alpha == "learnable":
            start = self.weight.new_zeros((), dtype=self._stat_dtype())
            # Not by setattr, which takes the public name above for an attribute that is in the way.
            self._parameters["log_alpha"] = nn.Parameter(start, requires_grad=self._is_trained())
        if post_norm:
            self.add_post_norm()

    def add_post_norm(self) -> None:
        """Append a fresh batch norm (weight 1, bias 0), frozen if the layer is; its keys join the state dict.

        The keys are ``norm.*``, or ``post_norm.*`` where a subclass has an attribute ``norm`` of its own.
        """
        self._enc_norm_name = next(key for key in POST_NORM_KEYS if lacks_attribute(self, key))
        norm = self.norm_class(self.weight.shape[0], device=self.weight.device, dtype=self._stat_dtype())
        self._enc_norm_frozen = not self._is_trained()
        norm.requires_grad_(not self._enc_norm_frozen)
        self._modules[self._enc_norm_name] = norm
        self._set_norm_mode()

    def _stat_dtype(self) -> torch.dtype:
        # Half precision is for the arithmetic: batch norm statistics and a learnable alpha stay in float32.
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def free_weights(self) -> list[nn.Parameter]:
        """The tensors that an optimizer owns in the place of the effective weight: ``[weight]`` of an ordinary layer.

        Of a pruned or parametrized layer see :func:`enc_plugin.reparametrized.free_weights`.
        """
        return free_weights(self)

    def _is_trained(self) -> bool:
        return any(p.requires_grad for p in self.free_weights())

    def train(self, mode: bool = True) -> ENCLayer:
        """Set the mode. The post-norm of a frozen layer stays in eval mode, so that its outputs do not change."""
        super().train(mode)
        if self.enc_norm is not None:
            self._set_norm_mode()
        return self

    def _set_norm_mode(self) -> None:
        norm, is_trained = self.enc_norm, self._is_trained()
        if is_trained and self._enc_norm_frozen:  # someone has unfrozen the layer's weight alone
            norm.requires_grad_(True)
            self._enc_norm_frozen = False
        # Training nothing but batch norms is a recipe too: then this one is not frozen.
        norm.train(self.training and (is_trained or any(p.requires_grad for p in norm.parameters())))

    @property
    def enc_alpha(self) -> float | Tensor:
        """Squared Frobenius norm of the effective weight: a number, or a scalar tensor when it is learnable."""
        return self._parameters["log_alpha"].exp() if self._enc_alpha is None else self._enc_alpha

    @property
    def enc_log_alpha(self) -> nn.Parameter | None:
        """Logarithm of a learnable alpha, a scalar; None for a constant one."""
        return self._parameters["log_alpha"] if self._enc_alpha is None else None

    @property
    def enc_norm(self) -> nn.Module | None:
        """The layer's own batch norm (post-norm), or None."""
        return None if self._enc_norm_name is None else self._modules[self._enc_norm_name]

    @property
    def enc_kept(self) -> Tensor | None:
        """Mask of ``torch.nn.utils.prune`` on the weight, 1 for what is kept; None for a layer that is not pruned."""
        return self._buffers.get("weight_mask")

    @property
    def enc_free_weight(self) -> Tensor:
        """The weight that is optimised, as it is now: ``weight``, or ``weight_orig`` of a pruned layer.

        Pruning renews ``weight`` in forward passes alone, so that it is out of date after a step of the optimizer.
        """
        return self.weight if self.enc_kept is None else self._parameters["weight_orig"]

    @property
    def effective_weight(self) -> Tensor:
        """The weight that the layer computes with, shaped like ``weight`` (differentiable).

        Of a pruned layer (``torch.nn.utils.prune``), pruned elements stay 0, and the equation holds for the others.
        """
        return enc_weight(self.enc_free_weight, self.enc_variant, self.enc_alpha, self.enc_kept)

    def _weight(self) -> Tensor:
        """The effective weight for this call: computed for the whole forward pass in advance, or here."""
        weight = weight_in_pass(self)
        return self.effective_weight if weight is None else weight

    def _post_norm(self, out: Tensor) -> Tensor:
        norm = self.enc_norm
        if norm is None:
            return out
        # Not of a proxy (torch.fx), which has no values yet. SyncBatchNorm has the values of other processes too.
        if (
            norm.training
            and isinstance(out, Tensor)
            and out.numel() == out.shape[1]
            and not isinstance(norm, nn.SyncBatchNorm)
        ):
            raise ValueError(
                f"input: this {type(self).__name__} has a batch norm of its own (post_norm), which in train mode needs "
                f"more than one value for each output, got an output of shape {tuple(out.shape)}: use batches of at "
                "least two samples (drop_last=True leaves out a last batch of one), post_norm=False, or model.eval()"
            )
        return norm(out)

    @property
    def enc_settings(self) -> dict[str, str | float | bool]:
        """``variant``, ``alpha`` (a number or ``'learnable'``) and ``post_norm``, as the constructor takes them."""
        alpha = "learnable" if self._enc_alpha is None else self._enc_alpha
        return {"variant": self.enc_variant, "alpha": alpha, "post_norm": self.enc_norm is not None}

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
        weight, bias, like, is_trained = self.effective_weight, self.bias, self.weight, self._is_trained()
        if self.enc_norm is not None:
            gain, shift = batch_norm_affine(self.enc_norm)
            weight = weight.double() * gain.reshape(-1, *[1] * (weight.ndim - 1))
            bias = shift if bias is None else shift + gain * bias.double()
            del self._modules[self._enc_norm_name]
        if self._enc_alpha is None:
            del self._parameters["log_alpha"]
        is_new_bias = bias is not self.bias
        remove_reparametrizations(self)
        for name in _OWN_STATE:
            self.__dict__.pop(name, None)
        self.__class__ = self.plain_class
        # New parameters: a weight that is tied to another layer's must not change there.
        self.weight = nn.Parameter(weight.to(like.dtype), requires_grad=is_trained)
        if is_new_bias:
            self.bias = nn.Parameter(bias.to(like.dtype), requires_grad=is_trained)

    def _apply(self, fn, recurse=True):
        norm, alpha = self._norm_is_meta(), self._alpha_is_meta()
        super()._apply(fn, recurse)
        # Off the meta device (to_empty) tensors hold whatever the memory held. A checkpoint of a plain network has no
        # values for these, and nothing else would set them.
        if norm and not self._norm_is_meta():
            self.enc_norm.reset_parameters()
        if alpha and not self._alpha_is_meta():
            nn.init.zeros_(self.enc_log_alpha)
        return self

    def _norm_is_meta(self) -> bool:
        return self.enc_norm is not None and any(t.is_meta for t in self.enc_norm.state_dict().values())

    def _alpha_is_meta(self) -> bool:
        return self.enc_log_alpha is not None and self.enc_log_alpha.is_meta

    # The settings have to stand in the file, and layer by layer: without them an ENC checkpoint passes for a plain one,
    # whose outputs are others. State dicts become plain dicts on the way (safetensors, averages, the prefix of a
    # backbone), which loses torch's _metadata, and a config beside the file gets lost. A buffer would survive too, but
    # averages, all-reduces, exported graphs and to_empty() would each have to treat it right. An extra state is made
    # from the layer each time it is saved, so it cannot be wrong.

    def get_extra_state(self) -> Tensor:
        """The layer's settings for the checkpoint: the entry ``<layer>._extra_state`` of state dicts."""
        return write_settings(self.enc_settings)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Change nothing: a layer keeps its own settings, and loading compares them with those of the checkpoint."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        entry, weights = f"{prefix}{KEY}", [state_dict.get(f"{prefix}{key}") for key in WEIGHT_KEYS]
        has_weight = any(weight is not None and weight.shape == self.weight.shape for weight in weights)
        if has_weight:
            own = self._norm_state(prefix)
            has_norm = any(key in state_dict for key in own)
            saved = read_settings(state_dict[entry]) if entry in state_dict else UNKNOWN if has_norm else {}
            warn_of_origin(saved, self.enc_settings, self.keeps_function)
            self.loaded_settings = saved
            # Where the checkpoint has no post-norm or no learnable alpha, ours stays and no key is reported missing.
            if not has_norm and not saved.get("post_norm"):
                state_dict.update(own)
            if self.enc_log_alpha is not None and saved.get("alpha") != "learnable":
                start = _off_meta(self.enc_log_alpha.detach())
                if "alpha" in saved:
                    start = torch.full_like(start, math.log(saved["alpha"]))
                state_dict.setdefault(f"{prefix}log_alpha", start)
        state_dict.setdefault(entry, None)
        self._is_loading = True  # assign=True sets the weight as an attribute
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        finally:
            del self._is_loading
        if has_weight:
            errors = args[-1]  # torch raises them once all layers are loaded
            try:
                check_normalizable(prefix[:-1], self.weight, self.enc_variant, self.enc_kept)
            except ValueError as error:
                errors.append(str(error))

    def _norm_state(self, prefix: str) -> dict[str, Tensor]:
        """State of the post-norm under its keys in a checkpoint; the initial one where it is on the meta device."""
        norm = self.enc_norm
        if norm is None:
            return {}
        if self._norm_is_meta():
            norm = self.norm_class(self.weight.shape[0], device="cpu", dtype=self._stat_dtype())
        return {f"{prefix}{self._enc_norm_name}.{key}": value for key, value in norm.state_dict().items()}

    def __setattr__(self, name, value):
        if name == "weight" and isinstance(value, nn.Parameter) and self._is_rescaled(value):
            raise ValueError(
                "weight: the new value is the old one with rescaled rows, as when a batch norm is fused into the "
                f"layer; {type(self).__name__} would normalise the scale away. Call enc_plugin.fold(model) first and "
                "fuse the plain model that it returns (to set the weight, copy into weight.data)"
            )
        if name in _PUBLIC and name != "norm" and "enc_variant" in self.__dict__ and lacks_attribute(self, name):
            raise AttributeError(
                f"{name}: the settings of an ENC layer are fixed when it is made, got {value!r}; make a new "
                f"{type(self).__name__}, or fold the model and convert it with other options"
            )
        super().__setattr__(name, value)

    def _is_rescaled(self, new: Tensor) -> bool:
        # A layer that is being made or loaded takes any weight.
        if "enc_variant" not in self.__dict__ or "_is_loading" in self.__dict__:
            return False
        return rows_are_rescaled(self._parameters.get("weight"), new)

    def extra_repr(self) -> str:
        """The stock layer's settings, the variant and alpha."""
        alpha = "'learnable'" if self._enc_alpha is None else f"{self._enc_alpha:g}"
        return f"{super().extra_repr()}, variant={self.enc_variant!r}, alpha={alpha}"


# Attributes of ENC layers that users read, and all that an ENC layer keeps in its own ``__dict__``.
_PUBLIC = tuple(name for name, value in vars(ENCLayer).items() if isinstance(value, _YieldingAttribute))
_OWN_STATE = ("enc_variant", "_enc_alpha", "_enc_norm_name", "_enc_norm_frozen", "loaded_settings", "keeps_function")


def lacks_attribute(layer: nn.Module, name: str) -> bool:
    """Whether a layer, stock or ENC, has no attribute ``name`` but the one that ENC layers define."""
    stores = (layer.__dict__, layer._parameters, layer._buffers, layer._modules)
    return not any(name in store for store in stores) and not hasattr(getattr(layer, "plain_class", type(layer)), name)


def _off_meta(scalar: Tensor) -> Tensor:
    return torch.zeros_like(scalar, device="cpu") if scalar.is_meta else scalar


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
        return self._post_norm(self._conv_forward(input, self._weight(), self.bias))


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


def _to_rows(out: Tensor) -> Tensor:
    """``(*, out)`` as ``(N, out)``, which batch norms take."""
    return out if out.ndim == 2 else out.reshape(-1, out.shape[-1])


def _to_shape_of(out: Tensor, rows: Tensor) -> Tensor:
    return rows if out.ndim == 2 else rows.view_as(out)


class _ENCLinear(ENCLayer):
    def _post_norm(self, out: Tensor) -> Tensor:
        if self.enc_norm is None:
            return out
        return _to_shape_of(out, super()._post_norm(_to_rows(out)))

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the effective weight, then apply the post-norm if there is one."""
        return self._post_norm(nn.functional.linear(input, self._weight(), self.bias))


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


class _ENCSubclass(ENCLayer):
    """Base of the ENC classes that :func:`enc_class` derives from subclasses of the stock layers."""

    def forward(self, *args, **kwargs) -> Tensor:
        """Run the stock class's own forward on the effective weight, then the post-norm if there is one."""
        return self._post_norm(self.forward_with(self._weight(), *args, **kwargs))

    def forward_with(self, weight: Tensor, *args, **kwargs) -> Tensor:
        """The stock class's own forward with ``weight`` in the place of the layer's."""
        # The stock forward sees this module as it will be after fold: its class, its attributes, another weight. (A
        # pruned layer has its own weight among its attributes.)
        state = {key: value for key, value in self.__dict__.items() if key != "weight"}
        state["_parameters"] = {**self._parameters, "weight": weight}
        state["_modules"] = {key: value for key, value in self._modules.items() if key != self._enc_norm_name}
        stock = object.__new__(self.plain_class)
        stock.__dict__ = dict(state)
        out = self.plain_class.forward(stock, *args, **kwargs)
        for key, value in stock.__dict__.items():
            if value is not state.get(key):  # set by the stock forward
                self.__dict__[key] = value
        return out

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


def reserved_attributes(layer: nn.Module) -> list[str]:
    """Attributes of a subclass of a stock layer whose names the ENC class needs and has no other name for."""
    defined = (name for cls in (ENCLayer, _ENCSubclass) for name in vars(cls) if not hasattr(nn.Module, name))
    taken = [name for name in defined if name not in (*_PUBLIC, "fuse") and not lacks_attribute(layer, name)]
    has_extra_state = type(layer).get_extra_state is not nn.Module.get_extra_state
    return taken + ["get_extra_state"] * has_extra_state


@cache
def _derive_enc_class(plain_class: type[nn.Module]) -> type[ENCLayer] | None:
    stock = next((base for base in ENC_LAYERS if issubclass(plain_class, base)), None)
    if stock is None or issubclass(plain_class, ENCLayer):
        return None
    own = _ENCSubclassLinear if stock is nn.Linear else _ENCSubclass
    # Public names that the subclass uses for something else keep its meaning.
    kept = {
        name: inspect.getattr_static(plain_class, name) for name in (*_PUBLIC, "fuse") if hasattr(plain_class, name)
    }
    # The bases of the stock class are direct bases too, for mmengine's initialisers (see above).
    return type(
        f"ENC{plain_class.__name__}",
        (own, plain_class, *plain_class.__bases__),
        {
            **kept,
            "plain_class": plain_class,
            "norm_class": ENC_LAYERS[stock].norm_class,
            "__doc__": f":class:`{plain_class.__module__}.{plain_class.__qualname__}` with an ENC weight.",
            "__module__": __name__,
        },
    )


def _new_subclass_layer(plain_class: type[nn.Module]) -> ENCLayer:
    return object.__new__(_derive_enc_class(plain_class))
