"""Selection of the layers that become ENC and of those that get a post-norm, and the reasons why others stay plain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeGuard

from torch import nn

from ..functional.normalizable import check_all_normalizable
from ..layers import POST_NORM_KEYS, ENCLayer, StockLayer, enc_class, lacks_attribute
from ..layers.origin import settings_text
from ..layers.reparametrized import free_weights
from ..table import first_few
from .eligible import Evidence
from .late_surgery import refuse_wrapped
from .projected import projection_of
from .subclass_trial import post_norm_problem, weight_problem

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Selection:
    """The layers that conversion will change.

    Attributes:
        layers: The layers that become or already are ENC, by name, in module order.
        needs_norm: The layers that will have a post-norm.
        problems: The layers that cannot become ENC, by name, with the reason.
        candidates: Names of all layers that can become ENC, before ``include`` and ``exclude``.
    """

    layers: dict[str, StockLayer]
    needs_norm: set[nn.Module]
    problems: dict[str, str]
    candidates: list[str]

    @property
    def frozen(self) -> list[str]:
        """Names of the plain layers among :attr:`layers` whose weight is not trained."""
        plain = {name: layer for name, layer in self.layers.items() if not isinstance(layer, ENCLayer)}
        return [name for name, layer in plain.items() if not any(p.requires_grad for p in free_weights(layer))]

    def gains_parameters(self, layer: StockLayer, alpha: float | str) -> bool:
        """Whether conversion adds parameters to ``layer``: a post-norm or a learnable alpha."""
        is_enc = isinstance(layer, ENCLayer)
        gains_norm = layer in self.needs_norm and not (is_enc and layer.enc_norm is not None)
        return gains_norm or (alpha == "learnable" and not is_enc)


def select_layers(
    model: nn.Module, evidence: Evidence, include: Patterns, exclude: Patterns, post_norm: str | bool
) -> Selection:
    """Select layers according to the recorded forward pass and the arguments of :func:`enc_plugin.to_enc`.

    Raises:
        ValueError: If a pattern matches no layer, or another module uses the weight of an ENC layer of ``model``.
        TypeError: If a pattern is not a string.
    """
    problems = _problems(model, evidence)
    modules = {name: module for name, module in model.named_modules() if _is_layer(module)}
    candidates = [name for name in modules if name not in problems]
    names = _matching(candidates, include, exclude, [*candidates, *problems])
    needs_norm = evidence.wants_norm() if post_norm == "auto" else set()
    if post_norm is True:
        needs_norm = {modules[name] for name in names}
    for name in names:
        problem = post_norm_problem(modules[name]) if modules[name] in needs_norm else None
        if problem is not None:
            problems[name] = problem
    layers = {name: modules[name] for name in names if name not in problems}
    return Selection(layers, needs_norm, problems, candidates)


def refuse_unfit(model: nn.Module, chosen: Selection, variant: str, alpha: float | str, how: str) -> None:
    """Raise ``ValueError`` if a selected layer cannot be converted. Called before the first layer is changed."""
    for name, layer in chosen.layers.items():
        _check_same_options(name, layer, variant, alpha, how)
        if not isinstance(layer, ENCLayer) and projection_of(layer) is None:
            _check_names(name, layer, alpha, layer in chosen.needs_norm)
    plain = {name: layer.weight for name, layer in chosen.layers.items() if not isinstance(layer, ENCLayer)}
    check_all_normalizable(plain, variant)
    if any(chosen.gains_parameters(layer, alpha) for layer in chosen.layers.values()):
        refuse_wrapped(model)


def _is_layer(module: nn.Module) -> TypeGuard[StockLayer]:
    return isinstance(module, ENCLayer) or enc_class(type(module)) is not None


def _problems(model: nn.Module, evidence: Evidence) -> dict[str, str]:
    """Layers that cannot be ENC, by name, with the reason."""
    problems = evidence.read_elsewhere()
    for name, module in model.named_modules():
        if _is_layer(module) and not isinstance(module, ENCLayer):
            reason = weight_problem(module)
            if "forward" in module.__dict__:  # would hide the forward of the ENC class
                reason = "its forward was replaced on the instance"
            if reason is not None:
                problems.setdefault(name, reason)
        elif name in problems:
            raise ValueError(
                f"layer {name!r} is already ENC, but {problems[name]}, so that module computes with the free weight; "
                "build the layer as a plain layer"
            )
    return problems


def _matching(names: list[str], include: Patterns, exclude: Patterns, excludable: list[str]) -> list[str]:
    """The ``names`` that the patterns select; ``exclude`` may also match other names in ``excludable``."""
    kept = set(names) if include is None else _hits("include", include, names)
    if exclude is not None:
        kept -= _hits("exclude", exclude, excludable)
    return [name for name in names if name in kept]


def _hits(argument: str, patterns: str | Sequence[str], names: list[str]) -> set[str]:
    found: set[str] = set()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, (list, tuple, set)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument}: expected a pattern, a sequence of patterns or None, got {patterns!r}")
    for pattern in patterns:
        hits = {n for n in names if n == pattern or n.startswith(f"{pattern}.") or fnmatchcase(n, pattern)}
        if not hits:
            shown = first_few(list(map(repr, names)), 8) or "(none)"
            raise ValueError(f"{argument}: {pattern!r} matches no layer; the layers are {shown}")
        found |= hits
    return found


def _check_names(name: str, layer: nn.Module, alpha: float | str, needs_norm: bool) -> None:
    """Raise if a subclass already uses the names of the parameters that the ENC layer needs."""
    taken = ["log_alpha"] if alpha == "learnable" and not lacks_attribute(layer, "log_alpha") else []
    if needs_norm and not any(lacks_attribute(layer, key) for key in POST_NORM_KEYS):
        taken += POST_NORM_KEYS
    if taken:
        raise ValueError(
            f"layer {name!r}: {type(layer).__name__} already has attributes {', '.join(taken)}, whose names the ENC "
            f"layer needs for its parameters; use a constant alpha and post_norm=False, or exclude=[{name!r}]"
        )


def _check_same_options(name: str, layer: StockLayer, variant: str, alpha: float | str, how: str) -> None:
    held = projection_of(layer)
    own: dict[str, float | str]
    if held is not None:
        own = {"variant": held.enc_variant, "alpha": held.enc_alpha, "how": "project"}
    elif isinstance(layer, ENCLayer):
        own = {"variant": layer.enc_variant, "alpha": layer.enc_settings["alpha"], "how": "reparametrize"}
    else:
        return
    given = {"variant": variant, "alpha": alpha, "how": how}
    if own != given:
        shown = [key for key in given if key != "how" or own[key] != given[key]]
        raise ValueError(
            f"layer {name!r} is already ENC with {settings_text(own, shown)}, but to_enc was called with "
            f"{settings_text(given, shown)}; use the same options, or exclude=[{name!r}]"
        )
