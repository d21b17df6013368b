"""Optimizer-wrapper constructor: what decays, what does not, and the epsilon shift of the decay."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..functional.decay import check_shift_eps, shift_direction
from ..layers import ENCLayer

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)

# Options that ENCOptimWrapperConstructor understands, stock ones first.
_STOCK_OPTIONS = (
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "dwconv_decay_mult",
    "flat_decay_mult",
    "bypass_duplicate",
)
_OWN_OPTIONS = ("lr_mult", "decay_mult", "shift_eps", "decoupled_decay")

# torch optimizers that shrink the weight itself instead of adding decay to the gradient. Adam, NAdam and RAdam say
# which they do in their groups ('decoupled_weight_decay').
_DECOUPLED = {"AdamW", "Adafactor", "Muon"}
_COUPLED = {"SGD", "Adam", "NAdam", "RAdam", "Adagrad", "Adadelta", "Adamax", "ASGD", "RMSprop"}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ENCOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    r"""Builds the optimizer with the paper's decay: weights decay, biases do not, ENC weights by the shifted L2.

    Biases (they do not appear in the bound, eq. 10-13), learnable alphas and batch norm biases get no decay; batch norm
    weights keep theirs. ENC weights get the gradient of the epsilon-shifted regularizer,
    :math:`\lambda (W - \epsilon U)` (:func:`enc_plugin.functional.shifted_l2_grad`), once per optimizer step, after
    unscaling and clipping. Works for any torch optimizer: with coupled decay (SGD, Adam) the shift joins the gradient;
    with decoupled decay (AdamW) it joins the decay. Parameters with equal settings share one group.

    Args:
        optim_wrapper_cfg: As for mmengine's default constructor.
        paramwise_cfg: Stock options (``custom_keys``, ``bias_lr_mult``, ``bias_decay_mult`` (default 0),
            ``norm_decay_mult`` (norm weights), ``dwconv_decay_mult``, ``flat_decay_mult``, ``bypass_duplicate``), and

            - ``lr_mult``, ``decay_mult``: factors for all parameters;
            - ``shift_eps``: the shift epsilon, in units of W, default 1e-3; 0 is plain decay. Also allowed within
              ``custom_keys``;
            - ``decoupled_decay``: whether the optimizer's decay is decoupled, for optimizers outside torch.

            An entry of ``custom_keys`` multiplies and overrides only what it names; biases below it stay without decay
            unless it sets ``decay_mult``.

    Raises:
        ValueError: If an option is unknown, a ``custom_keys`` entry matches no parameter, or ``shift_eps`` is negative.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        for option in self.paramwise_cfg:
            if option not in _STOCK_OPTIONS + _OWN_OPTIONS:
                raise ValueError(
                    f"paramwise_cfg: unknown option {option!r}; "
                    f"expected any of {', '.join(_STOCK_OPTIONS + _OWN_OPTIONS)}"
                )
        self.shift_eps = self.paramwise_cfg.get("shift_eps", 1e-3)
        for eps in (
            self.shift_eps,
            *(v.get("shift_eps", 0) for v in self.paramwise_cfg.get("custom_keys", {}).values()),
        ):
            check_shift_eps(eps)
        # Take what the config leaves out from the optimizer's own defaults: AdamW decays by 0.01 unless told otherwise.
        defaults = inspect.signature(self._optimizer_class()).parameters
        if self.base_lr is None and "lr" in defaults:
            self.base_lr = defaults["lr"].default
        if self.base_wd is None and "weight_decay" in defaults:
            self.base_wd = defaults["weight_decay"].default

    def _validate_cfg(self) -> None:
        # The stock check rejects decay options without an explicit weight_decay; here the optimizer's default counts.
        for name, value in (
            ("paramwise_cfg", self.paramwise_cfg),
            ("custom_keys", self.paramwise_cfg.get("custom_keys", {})),
        ):
            if not isinstance(value, dict):
                raise TypeError(f"{name}: expected a dict, got {type(value).__name__}")

    def _optimizer_class(self) -> type[torch.optim.Optimizer]:
        cls = self.optimizer_cfg["type"]
        if isinstance(cls, str):
            with OPTIMIZERS.switch_scope_and_registry(None) as registry:
                cls = registry.get(cls)
            if cls is None:
                raise ValueError(f"optimizer: {self.optimizer_cfg['type']!r} is not in the registry of optimizers")
        return cls

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **_: Any) -> None:
        """Sort all parameters of ``module`` into as few groups as their settings allow, appended to ``params``."""
        custom_keys = self.paramwise_cfg.get("custom_keys", {})
        by_length = sorted(sorted(custom_keys), key=len, reverse=True)  # the longest key wins, as in mmengine
        unmatched = set(custom_keys)
        groups: dict[tuple, dict] = {}
        seen: set[nn.Parameter] = set()
        names = []
        for module_name, owner in module.named_modules(prefix=prefix):
            for leaf, param in owner.named_parameters(recurse=False):
                if param in seen:  # a shared parameter belongs to its first owner
                    continue
                seen.add(param)
                name = f"{module_name}.{leaf}" if module_name else leaf
                names.append(name)
                hits = [key for key in by_length if key in name]
                unmatched -= set(hits)
                settings = self._settings(owner, leaf, param, custom_keys[hits[0]] if hits else {})
                key = tuple(settings.items())
                groups.setdefault(key, {"params": [], **settings})["params"].append(param)
        if unmatched:
            raise ValueError(
                f"custom_keys: {', '.join(map(repr, sorted(unmatched)))} matches no parameter; "
                f"a key is a part of a parameter's name, such as {', '.join(map(repr, names[:3]))}"
            )
        params.extend(groups.values())

    def _settings(self, owner: nn.Module, leaf: str, param: nn.Parameter, custom: dict) -> dict:
        """Group settings of one parameter: lr, weight_decay, and for an ENC weight its variant and shift."""
        option = self.paramwise_cfg.get
        is_enc = isinstance(owner, ENCLayer)
        is_bias = leaf == "bias" or leaf.endswith("_bias")
        is_norm = isinstance(owner, _NORMS)
        lr_mult, decay_mult = option("lr_mult", 1.0), option("decay_mult", 1.0)
        if is_bias and not is_norm:
            lr_mult *= option("bias_lr_mult", 1.0)
        if is_enc and leaf == "log_alpha":
            decay_mult = 0.0
        elif is_bias:
            decay_mult *= option("bias_decay_mult", 0.0)
        elif is_norm:
            decay_mult *= option("norm_decay_mult", 1.0)
        elif isinstance(owner, nn.Conv2d) and owner.in_channels == owner.groups > 1:
            decay_mult *= option("dwconv_decay_mult", 1.0)
        elif param.ndim == 1:
            decay_mult *= option("flat_decay_mult", 1.0)
        lr_mult *= custom.get("lr_mult", 1.0)
        decay_mult = custom.get("decay_mult", decay_mult)
        extra = {k: v for k, v in custom.items() if k not in ("lr_mult", "decay_mult", "shift_eps")}

        settings = dict(extra)
        if self.base_lr is not None:
            settings["lr"] = self.base_lr * lr_mult
        if self.base_wd is not None:
            settings["weight_decay"] = self.base_wd * decay_mult
        eps = custom.get("shift_eps", self.shift_eps)
        if is_enc and leaf == "weight" and eps > 0 and settings.get("weight_decay"):
            settings["enc_variant"] = owner.variant
            settings["shift_eps"] = eps
        return settings

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper for ``model``; distributed wrappers are looked through."""
        model = getattr(model, "module", model)
        # The stock constructor calls add_params only if paramwise_cfg is not empty.
        self.paramwise_cfg = self.paramwise_cfg or {"shift_eps": self.shift_eps}
        wrapper = super().__call__(model)
        add_shift(wrapper.optimizer, self.paramwise_cfg.get("decoupled_decay"))
        print_log(describe_groups(wrapper.optimizer), logger="current")
        return wrapper


def add_shift(optimizer: torch.optim.Optimizer, decoupled: bool | None = None) -> None:
    """Make ``optimizer`` apply the epsilon shift to every group with ``enc_variant`` and ``shift_eps``, at each step.

    Args:
        optimizer: Any torch optimizer whose groups hold ``lr`` and ``weight_decay``.
        decoupled: Whether its weight decay is decoupled from the gradient; None: known for torch's own optimizers,
            taken as coupled, with a warning, for others.
    """
    if not any("shift_eps" in group for group in optimizer.param_groups):
        return
    known = decoupled is not None
    if not known:
        names = {cls.__name__ for cls in type(optimizer).__mro__}
        decoupled = bool(names & _DECOUPLED)
        if not names & (_DECOUPLED | _COUPLED):
            print_log(
                f"ENC: whether {type(optimizer).__name__} decays weights through the gradient is not known; taken as "
                "so. Set paramwise_cfg=dict(decoupled_decay=True) if it shrinks the weights themselves (like AdamW).",
                logger="current",
                level=30,
            )
    for group in optimizer.param_groups:
        if "shift_eps" in group:
            # Adam, NAdam and RAdam carry the answer in their groups.
            group["enc_decoupled"] = decoupled if known else group.get("decoupled_weight_decay", decoupled)
    optimizer.register_step_pre_hook(_shift_decay)


@torch.no_grad()
def _shift_decay(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Step pre-hook: turns the decay ``lambda W`` that the optimizer will apply into ``lambda (W - eps U)``.

    Runs within ``optimizer.step``, hence after gradients were unscaled and clipped, once however many backward passes
    were accumulated, and not at all for a step that a gradient scaler skips.
    """
    grad_scale = getattr(optimizer, "grad_scale", None)  # fused optimizers unscale within the step
    for group in optimizer.param_groups:
        if "shift_eps" not in group:
            continue
        amount = group["weight_decay"] * group["shift_eps"]
        if amount == 0:
            continue
        trained = [p for p in group["params"] if p.grad is not None]
        directions = [shift_direction(p, group["enc_variant"]) for p in trained]
        if not trained:
            continue
        if group["enc_decoupled"]:
            # The step will multiply by (1 - lr lambda): divide by it beforehand, so that the shift is exact.
            lr = group["lr"]
            factor = lr * amount / (1 - lr * group["weight_decay"])
            torch._foreach_add_(trained, torch._foreach_mul(directions, factor))
        else:
            if grad_scale is not None:
                amount = amount * grad_scale
            sign = 1.0 if group.get("maximize") else -1.0
            torch._foreach_add_([p.grad for p in trained], torch._foreach_mul(directions, sign * amount))


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """One line: how many parameters (tensors and elements) decay, decay with the shift, and do not decay."""
    counts = {"shifted decay": [0, 0], "decay": [0, 0], "no decay": [0, 0]}
    for group in optimizer.param_groups:
        kind = "shifted decay" if "shift_eps" in group else "decay" if group.get("weight_decay") else "no decay"
        counts[kind][0] += len(group["params"])
        counts[kind][1] += sum(math.prod(p.shape) for p in group["params"])
    parts = (
        f"{tensors} tensors ({elements:,} elements) {kind}" for kind, (tensors, elements) in counts.items() if tensors
    )
    return f"ENC optimizer: {', '.join(parts)}; {len(optimizer.param_groups)} groups"
