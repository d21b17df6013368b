"""The forward pass of ENC layers: settings, effective weight and post-norm (a batch norm that the layer owns)."""

from __future__ import annotations

import weakref
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

# torch.fx records a call of this function instead of tracing into it.
torch.fx.wrap("enc_weight")

# Possible names of the post-norm among the submodules; the first one that a subclass does not use is taken.
POST_NORM_KEYS = ("norm", "post_norm")

living: weakref.WeakSet[EffectiveWeightLayer] = weakref.WeakSet()  # of all networks; also layers folded in place


class EffectiveWeightLayer(nn.Module):
    """Base of :class:`ENCLayer`, to be inherited before a stock class."""

    # Set by each subclass: the class of a folded layer, and the batch norm for its output.
    plain_class: type[nn.Module]
    norm_class: type[_BatchNorm]
    # Defined by the stock class.
    weight: Tensor
    bias: Tensor | None

    # No subclass of the stock layers uses these names. Internal code reads them and not the public aliases below, which
    # a subclass may define for something else.
    enc_variant: str
    _enc_alpha: float | None = None  # None: learnable
    _enc_norm_name: str | None = None  # key of the post-norm among the submodules
    _enc_norm_frozen = False  # whether the post-norm was frozen because the layer was
    # Whether the optimizer projects the free weight onto the constraint, so that it equals the effective weight.
    enc_is_projected = False

    variant = YieldingAttribute("enc_variant", "Variant of the ENC equation: ``'ws'``, ``'wn'``, ...")
    alpha = YieldingAttribute("enc_alpha", "Squared Frobenius norm of the effective weight: a number or a tensor.")
    log_alpha = YieldingAttribute("enc_log_alpha", "Logarithm of a learnable alpha, or None.")
    norm = YieldingAttribute("enc_norm", "The post-norm, or None.")
    settings = YieldingAttribute("enc_settings", "The constructor arguments ``variant``, ``alpha`` and ``post_norm``.")

    def __init__(
        self, *args: Any, variant: str = "ws", alpha: float | str = 1.0, post_norm: bool = False, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self._init_enc(variant, alpha, post_norm)

    def _init_enc(self, variant: str, alpha: float | str, post_norm: bool) -> None:
        """Turn an initialised stock layer into an ENC layer. Uses no random numbers and keeps all parameters."""
        check_variant(variant)
        check_alpha_option(alpha)
        check_type("post_norm", post_norm, bool, "True or False")
        check_row_length(self.weight, variant)
        self.enc_variant = variant
        living.add(self)
        self._enc_alpha = None if alpha == "learnable" else float(alpha)
        if alpha == "learnable":
            start = self.weight.new_zeros((), dtype=self._stat_dtype())
            # setattr would raise, because the alias `log_alpha` above exists.
            self._parameters["log_alpha"] = nn.Parameter(start, requires_grad=self._is_trained())
        if post_norm:
            self.add_post_norm()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        living.add(self)

    def reset_parameters(self) -> None:
        """Initialise the parameters of the stock layer as it does, and a learnable alpha to 1."""
        super().reset_parameters()  # type: ignore[misc]  # of the stock class
        if self._enc_alpha is None and "log_alpha" in self._parameters:
            nn.init.zeros_(self._own_parameter("log_alpha"))

    def _stat_dtype(self) -> torch.dtype:
        # Batch norm statistics and a learnable alpha stay in float32 if the weight is in half precision.
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def enc_alpha(self) -> float | Tensor:
        """Squared Frobenius norm of the effective weight: a number, or a scalar tensor if it is learnable."""
        return self._own_parameter("log_alpha").exp() if self._enc_alpha is None else self._enc_alpha

    @property
    def enc_log_alpha(self) -> nn.Parameter | None:
        """Logarithm of a learnable alpha, a scalar; None for a constant one."""
        return self._own_parameter("log_alpha") if self._enc_alpha is None else None

    def _own_parameter(self, key: str) -> nn.Parameter:
        # getattr might find an attribute of a subclass. DataParallel's replicas keep parameters in __dict__.
        return cast(nn.Parameter, self._parameters[key] if key in self._parameters else self.__dict__[key])

    @property
    def enc_settings(self) -> Settings:
        """The constructor arguments ``variant``, ``alpha`` (a number or ``'learnable'``) and ``post_norm``."""
        alpha: float | Literal["learnable"] = "learnable" if self._enc_alpha is None else self._enc_alpha
        return {"variant": self.enc_variant, "alpha": alpha, "post_norm": self.enc_norm is not None}

    @property
    def enc_kept(self) -> Tensor | None:
        """Mask of ``torch.nn.utils.prune`` for the weight, 1 for kept elements; None if the layer is not pruned."""
        return self._buffers.get("weight_mask")

    @property
    def enc_free_weight(self) -> Tensor:
        """The current weight that is optimised: ``weight``, or ``weight_orig`` of a pruned layer.

        Pruning updates ``weight`` only in forward passes, so ``weight`` is out of date after an optimizer step.
        """
        return self.weight if self.enc_kept is None else self._own_parameter("weight_orig")

    @property
    def effective_weight(self) -> Tensor:
        """The weight that the layer computes with, shaped like ``weight`` and differentiable.

        In a pruned layer (``torch.nn.utils.prune``), pruned elements are 0, and the variant normalises the others.
        """
        weight, kept = self.enc_free_weight, self.enc_kept
        if self.enc_is_projected:
            return weight if kept is None else weight * kept
        return enc_weight(weight, self.enc_variant, self.enc_alpha, kept)

    def _weight(self) -> Tensor:
        """The effective weight for this call. It may have been computed in advance, together with other layers."""
        weight = None if self.enc_is_projected else weight_in_pass(self)
        return self.effective_weight if weight is None else weight

    def free_weights(self) -> list[nn.Parameter]:
        """The parameters from which the weight is computed: ``[weight]``, unless the layer is pruned or parametrized.

        See :func:`enc_plugin.layers.reparametrized.free_weights`.
        """
        return free_weights(self)

    def _is_trained(self) -> bool:
        return any(p.requires_grad for p in self.free_weights())

    @property
    def enc_norm(self) -> _BatchNorm | None:
        """The post-norm, or None."""
        return None if self._enc_norm_name is None else cast(_BatchNorm, self._modules[self._enc_norm_name])

    def add_post_norm(self) -> None:
        """Append a new batch norm (weight 1, bias 0), frozen if the layer is.

        Its keys in the state dict are ``norm.*``, or ``post_norm.*`` if a subclass already has an attribute ``norm``.
        """
        self._enc_norm_name = next(key for key in POST_NORM_KEYS if lacks_attribute(self, key))
        norm = self.norm_class(self.weight.shape[0], device=self.weight.device, dtype=self._stat_dtype())
        self._enc_norm_frozen = not self._is_trained()
        norm.requires_grad_(not self._enc_norm_frozen)
        self._modules[self._enc_norm_name] = norm
        self._set_norm_mode(norm)

    def train(self, mode: bool = True) -> EffectiveWeightLayer:
        """Set the mode. The post-norm of a frozen layer stays in eval mode, so the layer's outputs do not change."""
        super().train(mode)
        if self.enc_norm is not None:
            self._set_norm_mode(self.enc_norm)
        return self

    def _set_norm_mode(self, norm: _BatchNorm) -> None:
        is_trained = self._is_trained()
        if is_trained and self._enc_norm_frozen:  # the user has unfrozen the weight, but not the post-norm
            norm.requires_grad_(True)
            self._enc_norm_frozen = False
        # If only batch norms are trained, this one is trained too.
        norm.train(self.training and (is_trained or any(p.requires_grad for p in norm.parameters())))

    def _post_norm(self, out: Tensor) -> Tensor:
        norm = self.enc_norm
        if norm is None:
            return out
        # A torch.fx proxy has no values yet.
        if isinstance(out, Tensor) and out.ndim == 1 + len(getattr(self, "kernel_size", ())):
            return self._post_norm(out[None])[0]  # a convolution of an input without batch dimension
        # SyncBatchNorm also sees the values of other processes.
        is_single = isinstance(out, Tensor) and norm.training and out.numel() == out.shape[1]
        if is_single and not isinstance(norm, nn.SyncBatchNorm):
            raise ValueError(
                f"input: this {type(self).__name__} has a post-norm (a batch norm that the layer owns), which in train "
                f"mode needs more than one value per channel, got an output of shape {tuple(out.shape)}; use batches "
                "of at least two samples (drop_last=True), post_norm=False, or model.eval()"
            )
        return norm(out)

    def extra_repr(self) -> str:
        """The stock layer's settings, the variant and alpha."""
        alpha = "'learnable'" if self._enc_alpha is None else f"{self._enc_alpha:g}"
        return f"{super().extra_repr()}, variant={self.enc_variant!r}, alpha={alpha}"
