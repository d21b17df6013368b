"""ENC layers when they are saved, loaded, moved, assigned to, or folded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..functional.normalizable import check_normalizable
from ..functional.weights import enc_weight
from .attributes import YieldingAttribute, lacks_attribute
from .effective import EffectiveWeightLayer, living
from .merged_norms import RefusesRescaledRows, batch_norm_affine
from .origin import KEY, UNKNOWN, Settings, read_settings, warn_of_origin, write_settings
from .reparametrized import WEIGHT_KEYS, deep_copy, remove_reparametrizations

# The public aliases, and the entries that ENC adds to the ``__dict__`` of a layer.
PUBLIC = tuple(name for name, value in vars(EffectiveWeightLayer).items() if isinstance(value, YieldingAttribute))
_OWN_STATE = (
    *("enc_variant", "_enc_alpha", "_enc_norm_name", "_enc_norm_frozen"),
    *("loaded_settings", "keeps_function", "enc_is_projected", "enc_projected"),
)


class ENCLayer(EffectiveWeightLayer, RefusesRescaledRows):
    r"""Base of the ENC layers. The optimizer updates the free weight W; the layer computes with the effective weight.

    The effective weight :math:`\hat W` has :math:`\lVert\hat W\rVert_F^2 = \alpha`
    (:func:`enc_plugin.functional.enc_weight`). The parameters have the same names and shapes as in the stock layer, so
    checkpoints of plain layers load. ``post_norm=True`` appends a batch norm to the layer (the *post-norm*, with the
    keys ``norm.*``); a checkpoint without these keys does not change it. ``alpha='learnable'`` adds a scalar parameter
    ``log_alpha``, initially 0; its exponential is alpha, which therefore stays positive.

    State dicts hold the settings of each layer beside its tensors (:meth:`get_extra_state`). Loading a state dict with
    other settings warns. Checkpoints of plain layers load into ENC layers with ``strict=True``. A checkpoint of ENC
    layers does not load strictly into plain layers, because these would compute with W: its settings are unexpected
    keys.

    The arguments are those of :class:`~enc_plugin.ENCConv2d`.
    """

    # Settings in the checkpoint that was loaded last: {} for a plain layer, None if nothing was loaded.
    loaded_settings: Settings | None = None
    # Whether loading weights of a plain network keeps its function (preserve=True), so that no warning is needed.
    keeps_function = False

    _instead = "Call enc_plugin.fold(model) first and fuse the plain model that it returns"

    def fuse(self) -> nn.Module:
        """The plain layer with the same output in eval mode; the method that timm's ``reparameterize_model`` calls.

        Returns:
            A new layer of the stock class, whose weight is the effective weight. The post-norm is merged into weight
            and bias.
        """
        plain = deep_copy(self)
        plain.become_plain()
        return plain

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by ``torch.jit.script``, which cannot compile ENC layers."""
        raise ValueError(
            "model: torch.jit.script cannot compile ENC layers; script the plain network that enc_plugin.fold(model) "
            "returns, or use torch.export or torch.jit.trace"
        )

    @torch.no_grad()
    def become_plain(self) -> None:
        """Turn into the plain layer of :meth:`fuse`, in place; hooks and references stay valid."""
        like, is_trained = self.weight, self._is_trained()
        weight: Tensor = self.effective_weight
        bias: Tensor | None = self.bias
        if self.enc_norm is not None and self._enc_norm_name is not None:
            gain, shift = batch_norm_affine(self.enc_norm)
            weight = weight.double() * gain.reshape(-1, *[1] * (weight.ndim - 1))
            bias = shift if bias is None else shift + gain * bias.double()
            del self._modules[self._enc_norm_name]
        if self._enc_alpha is None:
            del self._parameters["log_alpha"]
        is_new_bias = bias is not self.bias
        self._forget_settings()  # so that prune.remove is not refused
        remove_reparametrizations(self)
        self.become_stock()
        # A new parameter, because another layer may share the old one. In another memory format, a convolution on a GPU
        # would copy it in every call.
        self.weight = nn.Parameter(torch.empty_like(like).copy_(weight), requires_grad=is_trained)
        if is_new_bias and bias is not None:
            self.bias = nn.Parameter(bias.to(like.dtype), requires_grad=is_trained)

    def become_stock(self) -> None:
        """Turn into the plain layer with the free weight, in place; only without post-norm and learnable alpha."""
        self._forget_settings()
        layer: nn.Module = self
        layer.__class__ = self.plain_class

    def _forget_settings(self) -> None:
        for name in _OWN_STATE:
            self.__dict__.pop(name, None)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ENCLayer:
        norm_was_meta, alpha_was_meta = _is_meta(self.enc_norm), _is_meta(self.enc_log_alpha)
        super()._apply(fn, recurse)
        # Moving off the meta device (to_empty) leaves tensors uninitialised. A checkpoint of a plain network has no
        # values for the post-norm and log_alpha, so they are initialised here.
        norm, log_alpha = self.enc_norm, self.enc_log_alpha  # _apply may have replaced them
        if norm is not None and norm_was_meta and not _is_meta(norm):
            norm.reset_parameters()
        if log_alpha is not None and alpha_was_meta and not _is_meta(log_alpha):
            nn.init.zeros_(log_alpha)
        return self

    # Each layer's settings are part of the checkpoint. Without them an ENC checkpoint would look like a plain one,
    # which gives other outputs. torch's _metadata would not survive, because safetensors, averages and backbone
    # prefixes turn state dicts into plain dicts. A buffer would survive, but averages, all-reduces, exported graphs and
    # to_empty() could change it. An extra state is created from the layer at each save, so it is always right.

    def get_extra_state(self) -> Tensor:
        """The layer's settings for the checkpoint, saved under the key ``<layer>._extra_state``."""
        return write_settings(self.enc_settings)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Do nothing. A layer keeps its settings; loading compares them with those of the checkpoint."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        weights = (state_dict.get(f"{prefix}{key}") for key in WEIGHT_KEYS)
        has_weight = any(weight is not None and weight.shape == self.weight.shape for weight in weights)
        if has_weight:
            self._compare_and_complete(state_dict, prefix)
        state_dict.setdefault(f"{prefix}{KEY}", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if has_weight:
            errors = args[-1]  # torch raises these after all layers are loaded
            try:
                check_normalizable(prefix[:-1], self.enc_free_weight, self.enc_variant, self.enc_kept)
            except ValueError as error:
                errors.append(str(error))

    def _compare_and_complete(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Warn of other settings in a checkpoint, and add the layer's post-norm and learnable alpha if it has none."""
        own = self._norm_state(prefix)
        has_norm = any(key in state_dict for key in own)
        unsaved = UNKNOWN if has_norm else Settings()
        saved = read_settings(state_dict[f"{prefix}{KEY}"]) if f"{prefix}{KEY}" in state_dict else unsaved
        warn_of_origin(saved, self.enc_settings, self.keeps_function)
        self.loaded_settings = saved
        if not has_norm and not saved.get("post_norm"):
            state_dict.update(own)
        alpha = saved.get("alpha")
        if self.enc_log_alpha is not None and alpha != "learnable":
            start = self.enc_log_alpha.detach()
            start = torch.zeros_like(start, device="cpu") if start.is_meta else start
            start = start if alpha is None else torch.full_like(start, math.log(alpha))
            state_dict.setdefault(f"{prefix}log_alpha", start)

    def _norm_state(self, prefix: str) -> dict[str, Tensor]:
        """State of the post-norm with its keys in a checkpoint; its initial state if it is on the meta device."""
        norm = self.enc_norm
        if norm is None:
            return {}
        if _is_meta(norm):
            norm = self.norm_class(self.weight.shape[0], device="cpu", dtype=self._stat_dtype())
        return {f"{prefix}{self._enc_norm_name}.{key}": value for key, value in norm.state_dict().items()}

    def _normalises_rows(self) -> bool:
        return "enc_variant" in self.__dict__

    def __setattr__(self, name: str, value: Any) -> None:
        is_setting = name in PUBLIC and name != "norm" and self._normalises_rows() and lacks_attribute(self, name)
        if is_setting and "_is_replica" not in self.__dict__:  # DataParallel sets log_alpha of its replicas
            raise AttributeError(
                f"{name}: the settings of an ENC layer are fixed when it is created, got {value!r}; create a new "
                f"{type(self).__name__}, or fold the model and convert it with other options"
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight" and self.enc_kept is not None:  # prune.remove begins with this
            self._check_removal(self._own_parameter("weight_orig") * self.enc_kept)
        super().__delattr__(name)

    @torch.no_grad()
    def _check_removal(self, pruned: Tensor) -> None:
        """Raise ``ValueError`` if the layer would compute something else from the ``pruned`` weight without a mask."""
        if not self._normalises_rows() or self.enc_is_projected or pruned.is_meta:
            return
        with_mask = self.effective_weight
        change = enc_weight(pruned, self.enc_variant, self.enc_alpha) - with_mask
        if not change.norm() <= 1e-3 * with_mask.norm():  # NaN too
            raise ValueError(
                f"weight: without its mask, this {type(self).__name__} ({self.enc_variant!r}) would normalise zeros of "
                "pruned weights like any other value, so that they, and with them the outputs, would change. Call "
                "enc_plugin.fold(model): in the plain network that it returns, the pruning is permanent"
            )


def enc_layers(model: nn.Module) -> Iterator[tuple[str, ENCLayer]]:
    """Iterate over the ENC layers of ``model`` with their qualified names, each once, in module order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ENCLayer))


def living_layers() -> list[ENCLayer]:
    """The ENC layers of all networks of this process."""
    return [layer for layer in living if isinstance(layer, ENCLayer)]


def _is_meta(owner: nn.Module | Tensor | None) -> bool:
    tensors = owner.state_dict().values() if isinstance(owner, nn.Module) else (owner,)
    return any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors)
