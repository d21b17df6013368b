"""Parameter groups with the paper's weight decay, for any torch training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .functional.checks import check_not_negative, check_type
from .functional.decay import check_shift_eps
from .functional.weights import check_variant
from .layers import ENC_LAYERS, ENCLayer
from .projection import add_projection
from .shift import add_shift
from .steps.projected_groups import check_mode
from .surgery.projected import check_projectable, projected_layers, projection_of

__all__ = ["DEFAULT_SHIFT_EPS", "DecayRules", "add_projection", "add_shift", "describe_groups", "param_groups_enc"]

DEFAULT_SHIFT_EPS = 1e-3

_WEIGHTED = tuple(ENC_LAYERS)
_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class DecayRules:
    """The paper's weight decay as a rule for each parameter, as :func:`param_groups_enc` describes it.

    Args:
        lr: Base learning rate, multiplied by each parameter's factor; None leaves it to the optimizer.
        weight_decay: Base decay, multiplied by each parameter's factor; None leaves it to the optimizer.
        options: Any of :attr:`OPTIONS`, as documented at :class:`enc_plugin.engine.ENCOptimWrapperConstructor`.

    Raises:
        ValueError: If ``lr``, ``weight_decay``, ``shift_eps`` or a factor is negative or not finite, or ``plain_shift``
            is not a variant.
        TypeError: If one of them is not a number, or ``custom_keys`` is not a dict of dicts.
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

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if name == "lr" and isinstance(value, torch.Tensor):  # torch accepts one; its value may change later
                if value.numel() != 1 or not value.is_floating_point():
                    raise ValueError(f"lr: expected a number or a floating point tensor of one element, got {value!r}")
            elif value is not None:
                check_not_negative(name, value)
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
                    check_not_negative(name, value)
        if self.options.get("plain_shift") is not None:
            check_variant(self.options["plain_shift"])

    def groups(self, module: nn.Module, prefix: str = "") -> list[dict]:
        """Sort all parameters of ``module`` into groups; parameters with equal settings share one.

        Args:
            module: The model, or a part of it.
            prefix: Qualified name of ``module``, prepended to the names of its parameters.

        Returns:
            Groups in the form that torch optimizers take, in the order of their first parameter.

        Raises:
            ValueError: If an entry of ``custom_keys`` matches no parameter, a projected weight is pruned or
                parametrized, or the option ``projection`` is set for a model without projected layers.
        """
        self._check_projected(module)
        custom_keys = self.options.get("custom_keys", {})
        by_length = sorted(sorted(custom_keys), key=len, reverse=True)  # the longest key wins, as in mmengine
        unmatched = set(custom_keys)
        groups: dict[str, dict] = {}
        layers = [layer for layer in module.modules() if isinstance(layer, ENCLayer)]
        variants = {p: layer.enc_variant for layer in layers for p in layer.free_weights()}
        exempt = _declared_exempt(module)
        names: dict[nn.Parameter, str] = {}
        for module_name, owner in module.named_modules(prefix=prefix):
            for leaf, param in owner.named_parameters(recurse=False):
                if param in names:  # a shared parameter gets the settings of its first owner
                    continue
                names[param] = name = f"{module_name}.{leaf}" if module_name else leaf
                hits = [key for key in by_length if key in name]
                unmatched -= set(hits)
                custom = custom_keys[hits[0]] if hits else {}
                if param in exempt:
                    custom = {"decay_mult": 0.0, **custom}
                settings = self._settings(owner, leaf, param, custom, variants.get(param))
                key = repr(settings)  # custom settings may be lists
                groups.setdefault(key, {"params": [], **settings})["params"].append(param)
        if unmatched:
            raise ValueError(
                f"custom_keys: {', '.join(map(repr, sorted(unmatched)))} matches no parameter; "
                f"a key is a part of a parameter's name, such as {', '.join(map(repr, [*names.values()][:3]))}"
            )
        return list(groups.values())

    def _check_projected(self, module: nn.Module) -> None:
        check_projectable(module)
        if "projection" in self.options and not any(projected_layers(module)):
            raise ValueError(
                "projection: the model has no projected layers; convert it by to_enc(model, how='project'), in a "
                "config by enc=dict(how='project')"
            )

    def _settings(
        self, owner: nn.Module, leaf: str, param: nn.Parameter, custom: Mapping[str, Any], variant: str | None
    ) -> dict:
        """Group settings of one parameter: lr, weight_decay, and for an ENC weight its variant and shift.

        Args:
            owner: The module that holds the parameter.
            leaf: Name of the parameter within ``owner``, such as ``'weight'``.
            param: The parameter.
            custom: The entry of ``custom_keys`` that applies to it, or an empty mapping.
            variant: Variant of the ENC layer if the parameter is one of its :meth:`ENCLayer.free_weights`, or None.
        """
        lr_mult, decay_mult = self._factors(owner, leaf, param, custom)
        settings = {k: v for k, v in custom.items() if k not in ("lr_mult", "decay_mult", "shift_eps", "projection")}
        if self.lr is not None:
            settings["lr"] = self.lr * lr_mult
        if self.weight_decay is not None:
            settings["weight_decay"] = self.weight_decay * decay_mult
        projected = projection_of(owner) if leaf == "weight" else None
        if projected is not None:
            return settings | {
                "enc_projection": custom.get("projection", self.options.get("projection", "retract")),
                "enc_variant": projected.enc_variant,
                "enc_alpha": projected.enc_alpha,
            }
        if leaf == "weight" and not isinstance(owner, ENCLayer) and isinstance(owner, _WEIGHTED):
            variant = self.options.get("plain_shift")
        if variant is not None and settings.get("weight_decay"):
            settings["enc_variant"] = variant  # also if eps is 0, so that a run can be resumed with another epsilon
            eps = custom.get("shift_eps", self.options.get("shift_eps", DEFAULT_SHIFT_EPS))
            if eps > 0:
                settings["shift_eps"] = eps
        return settings

    def _factors(
        self, owner: nn.Module, leaf: str, param: nn.Parameter, custom: Mapping[str, Any]
    ) -> tuple[float, float]:
        """Factors of the learning rate and the weight decay of one parameter."""
        option = self.options.get
        is_bias = leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_")  # bias_ih_l0 of nn.LSTM
        is_norm = isinstance(owner, _NORMS)
        lr_mult, decay_mult = option("lr_mult", 1.0), option("decay_mult", 1.0)
        if is_bias and not is_norm:
            lr_mult *= option("bias_lr_mult", 1.0)
        if isinstance(owner, ENCLayer) and leaf == "log_alpha":
            decay_mult = 0.0
        elif is_bias:
            decay_mult *= option("bias_decay_mult", 0.0)
        elif is_norm:
            decay_mult *= option("norm_decay_mult", 1.0)
        elif isinstance(owner, nn.Conv2d) and owner.in_channels == owner.groups > 1:
            decay_mult *= option("dwconv_decay_mult", 1.0)
        elif param.ndim == 1:
            decay_mult *= option("flat_decay_mult", 1.0)
        return lr_mult * custom.get("lr_mult", 1.0), custom.get("decay_mult", decay_mult)


def _declared_exempt(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that ``model`` or a part of it exempts from decay by ``no_weight_decay()``, as networks of timm do."""
    found: set[nn.Parameter] = set()
    for part in model.modules():
        declared = getattr(part, "no_weight_decay", None)
        patterns = declared() if callable(declared) else ()
        found.update(p for name, p in part.named_parameters() if any(fnmatchcase(name, pat) for pat in patterns))
    return found


def param_groups_enc(
    model: nn.Module, weight_decay: float = 1e-4, *, lr: float | None = None, **options: Any
) -> list[dict]:
    """Parameter groups with the paper's weight decay, for any torch optimizer.

    Weights decay. Biases do not, nor do parameters that the network exempts by ``no_weight_decay()``, such as the
    position embeddings of timm's transformers. ENC weights are in separate groups with their variant and the shift
    epsilon, which every optimizer applies; :func:`add_shift` checks that it can. Norm weights decay, as in the paper,
    but unlike in timm's ``param_groups_weight_decay``.

    Args:
        model: Any ``nn.Module``; without ENC layers, no group has a shift.
        weight_decay: The decay lambda of the parameters that decay.
        lr: Learning rate, needed only with ``lr_mult`` or ``bias_lr_mult``; None leaves it to the optimizer.
        **options: ``shift_eps`` (default 1e-3; 0 is plain decay), ``custom_keys``, ``bias_decay_mult``, and the other
            options that :class:`enc_plugin.engine.ENCOptimWrapperConstructor` takes as ``paramwise_cfg``.

    Returns:
        Groups in the form that torch optimizers take.

    Raises:
        ValueError: If an option is unknown, ``shift_eps`` is negative, an entry of ``custom_keys`` matches no
            parameter, or a learning rate factor is given without ``lr``.

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
        raise ValueError("lr: lr_mult and bias_lr_mult are factors of the learning rate, so pass lr=... too")
    return rules.groups(model)


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """One line with the numbers of tensors and elements that are projected, decay, decay with a shift, or do not."""
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
