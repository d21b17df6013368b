"""Which weights of a converted network stay plain, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from ..layers import enc_class
from .projected import Projected, constrained_layers


def plain_weights(model: nn.Module, problems: Mapping[str, str]) -> dict[str, str]:
    """Names of layers and parameters with a plain weight of at least two dimensions above 1, with the reason.

    Layers are listed by layer name. Other modules may own several such weights, which are listed by parameter name.

    Args:
        model: The converted network.
        problems: Layers that cannot be ENC, by name, with the reason.
    """
    plain = {}
    constrained = _constrained(model)
    for name, module in model.named_modules():
        if name in problems:
            plain[name] = problems[name]
        if module in constrained or any(f"{name}.".startswith(f"{layer}.") for layer in problems):
            continue  # submodules of a layer that cannot be ENC, such as its parametrizations, are not listed
        if enc_class(type(module)) is not None:
            plain[name] = "left out by include / exclude"
        else:
            plain |= own_matrices(name, module)
    return plain


def own_matrices(name: str, module: nn.Module) -> dict[str, str]:
    """The weights that ``module``, which is not a layer that ENC knows, owns itself, as in :func:`plain_weights`."""
    owner = type(module).__name__
    found = {}
    for leaf, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, nn.UninitializedParameter) or sum(size > 1 for size in parameter.shape) < 2:
            continue
        if leaf == "weight":
            found[name] = f"{owner} has no ENC layer"
        else:
            shape = "x".join(map(str, parameter.shape))
            found[f"{name}.{leaf}" if name else leaf] = f"{shape} parameter of {owner}, not of one of its layers"
    return found


def describe_plain_majority(model: nn.Module, problems: Mapping[str, str]) -> str:
    """A message if at most half of the layers' weights of a converted network are ENC, else an empty string.

    Args:
        model: The converted network.
        problems: Layers of ``model`` that cannot be ENC, by name, with the reason.
    """
    modules = dict(model.named_modules())
    plain = sum(_num_weights(modules[name]) for name in problems)
    layers = _constrained(model)
    total = plain + sum(map(_num_weights, layers))
    if plain <= total / 2:
        return ""
    reasons = "; ".join(
        f"{why} ({count} layer{'s' * (count > 1)})" for why, count in Counter(problems.values()).most_common(3)
    )
    return (
        f"{len(problems)} of {len(problems) + len(layers)} layers of {type(model).__name__} stay plain, "
        f"{plain / total:.0%} of their weights, and the constraint does not hold for them: {reasons}"
    )


def _constrained(model: nn.Module) -> set[nn.Module]:
    return {x.layer if isinstance(x, Projected) else x for _, x in constrained_layers(model)}


def _num_weights(layer: nn.Module) -> int:
    parameters = layer.parameters()
    return sum(p.numel() for p in parameters if not isinstance(p, nn.UninitializedParameter) and p.ndim > 1)
