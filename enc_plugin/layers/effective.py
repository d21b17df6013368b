"""What an ENC layer computes with: the effective weight of its free weight, and a batch norm behind it."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..forward_pass import weight_in_pass
from ..functional.checks import check_type
from ..functional.normalizable import check_row_length
from ..functional.weights import check_alpha_option, check_variant, enc_weight
from .attributes import YieldingAttribute, lacks_attribute
from .origin import Settings
from .reparametrized import free_weights

# torch.fx is to record a call of this function, and not to look inside.
torch.fx.wrap("enc_weight")

# Name of the post-norm among the submodules: the first that a subclass has not taken.
POST_NORM_KEYS = ("norm", "post_norm")


class EffectiveWeightLayer(nn.Module):
    """Base of :class:`ENCLayer`: settings, effective weight and post-norm of a layer, in front of its stock class."""

    # The stock class that fold() goes back to, and the batch norm that fits its output: set by each subclass.
    plain_class: type[nn.Module]
    norm_class: type[_BatchNorm]
    # Of the stock class, which comes behind this one among the bases.
    weight: Tensor
    bias: Tensor | None

    # Own attributes have names that no subclass of the stock layers uses. Internal code reads these, not the public
    # names below, which may be a subclass's own.
    enc_variant: str
    _enc_alpha: float | None = None  # None: learnable
    _enc_norm_name: str | None = None  # key of the post-norm among the submodules
    _enc_norm_frozen = False  # because the layer was, when it got the norm
    # Whether the optimizer holds the free weight on the constraint set, so that it is the effective one.
    enc_is_projected = False

    variant = YieldingAttribute("enc_variant", "Variant of the ENC equation: ``'ws'``, ``'wn'``, ...")
    alpha = YieldingAttribute("enc_alpha", "Squared Frobenius norm of the effective weight: a number or a tensor.")
    log_alpha = YieldingAttribute("enc_log_alpha", "Logarithm of a learnable alpha, or None.")
    norm = YieldingAttribute("enc_norm", "The layer's own batch norm, or None.")
    settings = YieldingAttribute("enc_settings", "``variant``, ``alpha`` and ``post_norm``, as the constructor takes.")

    def __init__(
        self, *args: Any, variant: str = "ws", alpha: float | str = 1.0, post_norm: bool = False, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self._init_enc(variant, alpha, post_norm)

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

    def _stat_dtype(self) -> torch.dtype:
        # Half precision is for the arithmetic: batch norm statistics and a learnable alpha stay in float32.
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def enc_alpha(self) -> float | Tensor:
        """Squared Frobenius norm of the effective weight: a number, or a scalar tensor when it is learnable."""
        return self._own_parameter("log_alpha").exp() if self._enc_alpha is None else self._enc_alpha

    @property
    def enc_log_alpha(self) -> nn.Parameter | None:
        """Logarithm of a learnable alpha, a scalar; None for a constant one."""
        return self._own_parameter("log_alpha") if self._enc_alpha is None else None

    def _own_parameter(self, key: str) -> nn.Parameter:
        # Not by getattr, which may find a subclass's attribute.
        return cast(nn.Parameter, self._parameters[key])

    @property
    def enc_settings(self) -> Settings:
        """``variant``, ``alpha`` (a number or ``'learnable'``) and ``post_norm``, as the constructor takes them."""
        alpha: float | Literal["learnable"] = "learnable" if self._enc_alpha is None else self._enc_alpha
        return {"variant": self.enc_variant, "alpha": alpha, "post_norm": self.enc_norm is not None}

    @property
    def enc_kept(self) -> Tensor | None:
        """Mask of ``torch.nn.utils.prune`` on the weight, 1 for what is kept; None for a layer that is not pruned."""
        return self._buffers.get("weight_mask")

    @property
    def enc_free_weight(self) -> Tensor:
        """The weight that is optimised, as it is now: ``weight``, or ``weight_orig`` of a pruned layer.

        Pruning renews ``weight`` in forward passes alone, so that it is out of date after a step of the optimizer.
        """
        return self.weight if self.enc_kept is None else self._own_parameter("weight_orig")

    @property
    def effective_weight(self) -> Tensor:
        """The weight that the layer computes with, shaped like ``weight`` (differentiable).

        Of a pruned layer (``torch.nn.utils.prune``), pruned elements stay 0, and the equation holds for the others.
        """
        if self.enc_is_projected:
            return self.enc_free_weight
        return enc_weight(self.enc_free_weight, self.enc_variant, self.enc_alpha, self.enc_kept)

    def _weight(self) -> Tensor:
        """The effective weight for this call: computed for the whole forward pass in advance, or here."""
        weight = None if self.enc_is_projected else weight_in_pass(self)
        return self.effective_weight if weight is None else weight

    def free_weights(self) -> list[nn.Parameter]:
        """The tensors that an optimizer owns in the place of the effective weight: ``[weight]`` of an ordinary layer.

        Of a pruned or parametrized layer see :func:`enc_plugin.layers.reparametrized.free_weights`.
        """
        return free_weights(self)

    def _is_trained(self) -> bool:
        return any(p.requires_grad for p in self.free_weights())

    @property
    def enc_norm(self) -> _BatchNorm | None:
        """The layer's own batch norm (post-norm), or None."""
        return None if self._enc_norm_name is None else cast(_BatchNorm, self._modules[self._enc_norm_name])

    def add_post_norm(self) -> None:
        """Append a fresh batch norm (weight 1, bias 0), frozen if the layer is; its keys join the state dict.

        The keys are ``norm.*``, or ``post_norm.*`` where a subclass has an attribute ``norm`` of its own.
        """
        self._enc_norm_name = next(key for key in POST_NORM_KEYS if lacks_attribute(self, key))
        norm = self.norm_class(self.weight.shape[0], device=self.weight.device, dtype=self._stat_dtype())
        self._enc_norm_frozen = not self._is_trained()
        norm.requires_grad_(not self._enc_norm_frozen)
        self._modules[self._enc_norm_name] = norm
        self._set_norm_mode(norm)

    def train(self, mode: bool = True) -> EffectiveWeightLayer:
        """Set the mode. The post-norm of a frozen layer stays in eval mode, so that its outputs do not change."""
        super().train(mode)
        if self.enc_norm is not None:
            self._set_norm_mode(self.enc_norm)
        return self

    def _set_norm_mode(self, norm: _BatchNorm) -> None:
        is_trained = self._is_trained()
        if is_trained and self._enc_norm_frozen:  # someone has unfrozen the layer's weight alone
            norm.requires_grad_(True)
            self._enc_norm_frozen = False
        # Training nothing but batch norms is a recipe too: then this one is not frozen.
        norm.train(self.training and (is_trained or any(p.requires_grad for p in norm.parameters())))

    def _post_norm(self, out: Tensor) -> Tensor:
        norm = self.enc_norm
        if norm is None:
            return out
        # Not of a proxy (torch.fx), which has no values yet. SyncBatchNorm has the values of other processes too.
        is_single = isinstance(out, Tensor) and norm.training and out.numel() == out.shape[1]
        if is_single and not isinstance(norm, nn.SyncBatchNorm):
            raise ValueError(
                f"input: this {type(self).__name__} has a batch norm of its own (post_norm), which in train mode needs "
                f"more than one value for each output, got an output of shape {tuple(out.shape)}: use batches of at "
                "least two samples (drop_last=True leaves out a last batch of one), post_norm=False, or model.eval()"
            )
        return norm(out)

    def extra_repr(self) -> str:
        """The stock layer's settings, the variant and alpha."""
        alpha = "'learnable'" if self._enc_alpha is None else f"{self._enc_alpha:g}"
        return f"{super().extra_repr()}, variant={self.enc_variant!r}, alpha={alpha}"
