"""What decays and what does not: parameter groups for any training loop, on torch alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .functional.checks import check_number, check_type
from .functional.decay import check_shift_eps
from .functional.weights import check_variant
from .layers import ENC_LAYERS, ENCLayer
from .projection import add_projection, check_mode
from .shift import add_shift
from .surgery.projected import projected_layers, projection_of

__all__ = ["DEFAULT_SHIFT_EPS", "DecayRules", "add_projection", "add_shift", "describe_groups", "param_groups_enc"]

DEFAULT_SHIFT_EPS = 1e-3

_WEIGHTED = tuple(ENC_LAYERS)
_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)

_FACTOR = "a finite number >= 0"


def _is_factor(value: float) -> bool:
    return 0 <= value < math.inf


@dataclass(frozen=True)
class DecayRules:
    """The paper's decay as a rule for each parameter: weights decay, biases do not, ENC weights by the shifted L2.

    Biases, learnable alphas and norm biases get no decay, norm weights keep theirs, and ENC weights carry their variant
    and the shift epsilon, by which the optimizer's step is shifted (:mod:`enc_plugin.shift`).

    Args:
        lr: Learning rate of a parameter without a factor; None leaves it to the optimizer.
        weight_decay: Decay of a parameter without a factor; None leaves it to the optimizer.
        options: Any of :attr:`OPTIONS`, as documented at :class:`enc_plugin.engine.ENCOptimWrapperConstructor`.

    Raises:
        ValueError: If ``lr``, ``weight_decay``, ``shift_eps`` or a factor is negative or not finite, or ``plain_shift``
            names no variant.
        TypeError: If one of them is no number, or ``custom_keys`` no dict of dicts.
    """

    OPTIONS = (
        "custom_keys",
        "bias_lr_mult",
        "bias_decay_mult",
        "norm_decay_mult",
        "dwconv_decay_mult",
        "flat_decay_mult",
        "lr_mult",
        "decay_mult",
        "shift_eps",
        "plain_shift",
        "projection",
    )

    lr: float | None = None
    weight_decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if name == "lr" and isinstance(value, torch.Tensor):  # torch takes one; its value may change
                if value.numel() != 1 or not value.is_floating_point():
                    raise ValueError(f"lr: expected a number or a floating point tensor of one element, got {value!r}")
            elif value is not None:
                check_number(name, value, _FACTOR, _is_factor)
        check_type("options", self.options, Mapping, "a dict of options")
        custom_keys = self.options.get("custom_keys", {})
        check_type("custom_keys", custom_keys, Mapping, "a dict of a dict for each key")
        for key, settings in custom_keys.items():
            check_type(f"custom_keys[{key!r}]", settings, Mapping, "a dict of options")
        for settings in (self.options, *custom_keys.values()):
            for name, value in settings.items():
                if name == "shift_eps":
                    check_shift_eps(value, name)
                elif name == "projection":
                    check_mode(value)
                elif name.endswith("_mult"):
                    check_number(name, value, _FACTOR, _is_factor)
        if self.options.get("plain_shift") is not None:
            check_variant(self.options["plain_shift"])

    def groups(self, module: nn.Module, prefix: str = "") -> list[dict]:
        """Sort all parameters of ``module`` into as few optimizer groups as their settings allow.

        Args:
            module: The model, or a part of it.
            prefix: Qualified name of ``module``, put before its parameters' names.

        Returns:
            Groups in the form that torch optimizers take, in the order of their first parameter.

        Raises:
            ValueError: If an entry of ``custom_keys`` matches no parameter.
        """
        custom_keys = self.options.get("custom_keys", {})
        by_length = sorted(sorted(custom_keys), key=len, reverse=True)  # the longest key wins, as in mmengine
        unmatched = set(custom_keys)
        groups: dict[str, dict] = {}
        layers = [layer for layer in module.modules() if isinstance(layer, ENCLayer)]
        variants = {p: layer.enc_variant for layer in layers for p in layer.free_weights()}
        for name, found in projected_layers(module):
            if "weight" not in found.layer._parameters:
                raise ValueError(
                    f"layer {name!r}: its weight is pruned or parametrized, computed from another tensor, so that an "
                    "optimizer cannot hold it on the constraint set; use to_enc with how='reparametrize' for it"
                )
        if "projection" in self.options and next(projected_layers(module), None) is None:
            raise ValueError(
                "projection: no layer of the model is to be held on the constraint set; mark them by "
                "to_enc(model, how='project'), in a config enc=dict(how='project')"
            )
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
                settings = self.settings(owner, leaf, param, custom_keys[hits[0]] if hits else {}, variants.get(param))
                key = repr(settings)  # custom settings may be lists
                groups.setdefault(key, {"params": [], **settings})["params"].append(param)
        if unmatched:
            raise ValueError(
                f"custom_keys: {', '.join(map(repr, sorted(unmatched)))} matches no parameter; "
                f"a key is a part of a parameter's name, such as {', '.join(map(repr, names[:3]))}"
            )
        return list(groups.values())

    def settings(
        self,
        owner: nn.Module,
        leaf: str,
        param: nn.Parameter,
        custom: Mapping[str, Any],
        variant: str | None = None,
    ) -> dict:
        """Group settings of one parameter: lr, weight_decay, and for an ENC weight its variant and shift.

        Args:
            owner: The module that holds the parameter.
            leaf: Its name there, such as ``'weight'``.
            param: The parameter.
            custom: The entry of ``custom_keys`` that applies to it, or an empty mapping.
            variant: Of the ENC layer whose weight it is (:meth:`ENCLayer.free_weights`), or None.
        """
        option = self.options.get
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
        extra = {k: v for k, v in custom.items() if k not in ("lr_mult", "decay_mult", "shift_eps", "projection")}

        settings = dict(extra)
        if self.lr is not None:
            settings["lr"] = self.lr * lr_mult
        if self.weight_decay is not None:
            settings["weight_decay"] = self.weight_decay * decay_mult
        eps = custom.get("shift_eps", option("shift_eps", DEFAULT_SHIFT_EPS))
        held = projection_of(owner) if leaf == "weight" else None
        if held is not None:
            mode = custom.get("projection", option("projection", "retract"))
            return settings | {"enc_projection": mode, "enc_variant": held.enc_variant, "enc_alpha": held.enc_alpha}
        if leaf == "weight" and not is_enc and isinstance(owner, _WEIGHTED):
            variant = option("plain_shift")
        if variant is not None and settings.get("weight_decay"):
            settings["enc_variant"] = variant  # without a shift too, so that a run can go on with another epsilon
            if eps > 0:
                settings["shift_eps"] = eps
        return settings


def param_groups_enc(
    model: nn.Module, weight_decay: float = 1e-4, *, lr: float | None = None, **options: Any
) -> list[dict]:
    """Parameter groups with the paper's decay for any torch optimizer: weights decay, biases do not.

    ENC weights are in groups of their own, which carry their variant and the shift epsilon. Every optimizer acts on it,
    and :func:`add_shift` checks that it can. Unlike timm's ``param_groups_weight_decay``, norm weights decay, as in the
    paper.

    Args:
        model: Any ``nn.Module``; without ENC layers, no group carries a shift.
        weight_decay: The decay lambda of the parameters that decay.
        lr: Learning rate, needed for ``lr_mult`` and ``bias_lr_mult`` alone; None leaves it to the optimizer.
        **options: ``shift_eps`` (default 1e-3; 0 is plain decay), ``custom_keys``, ``bias_decay_mult``, and the other
            options that :class:`enc_plugin.engine.ENCOptimWrapperConstructor` takes as ``paramwise_cfg``.

    Returns:
        Groups in the form that torch optimizers take.

    Raises:
        ValueError: If an option is unknown, ``shift_eps`` is negative, an entry of ``custom_keys`` matches no
            parameter, or a learning rate factor comes without ``lr``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        >>> [(len(group["params"]), group["weight_decay"]) for group in param_groups_enc(model, 1e-4)]
        [(2, 0.0001), (1, 0.0)]
    """
    for option in options:
        if option not in DecayRules.OPTIONS:
            raise ValueError(f"options: unknown option {option!r}; expected any of {', '.join(DecayRules.OPTIONS)}")
    check_type("model", model, nn.Module, "a torch.nn.Module")
    rules = DecayRules(lr, weight_decay, options)
    factors = [options, *options.get("custom_keys", {}).values()]
    if lr is None and any(key.endswith("lr_mult") for settings in factors for key in settings):
        raise ValueError("lr: a factor of the learning rate is given (lr_mult, bias_lr_mult), so pass lr=... too")
    return rules.groups(model)


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """One line: how many parameters (tensors and elements) are projected, decay (with the shift), or do not decay."""
    counts = {"projected": [0, 0], "shifted decay": [0, 0], "decay": [0, 0], "no decay": [0, 0]}
    for group in optimizer.param_groups:
        kind = "shifted decay" if "shift_eps" in group else "decay" if group.get("weight_decay") else "no decay"
        kind = "projected" if "enc_projection" in group else kind
        counts[kind][0] += len(group["params"])
        counts[kind][1] += sum(math.prod(p.shape) for p in group["params"])
    parts = (
        f"{tensors} tensors ({elements:,} elements) {kind}" for kind, (tensors, elements) in counts.items() if tensors
    )
    return f"ENC optimizer: {', '.join(parts)}; {len(optimizer.param_groups)} groups"
