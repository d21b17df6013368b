"""Layers whose weight ``torch.nn.utils`` recomputes: pruning, parametrizations, weight norm and spectral norm."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)

# Possible keys of a weight in a state dict: `weight`, and those that torch.nn.utils uses instead.
WEIGHT_KEYS = ("weight", "weight_orig", "weight_v", *(f"parametrizations.weight.original{i}" for i in ("", "0", "1")))


def free_weights(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters from which ``layer.weight`` is computed and that have its shape.

    That is ``[weight]`` for an ordinary layer. Pruning and the old spectral norm use ``weight_orig``, the old weight
    norm ``weight_v``, a parametrization ``parametrizations.weight.original`` (or ``original0``, ...).
    """
    found = [layer._parameters.get(key) for key in ("weight", "weight_orig", "weight_v")]
    if parametrize.is_parametrized(layer, "weight"):
        shape = layer.weight.shape
        originals = layer.get_submodule("parametrizations.weight")._parameters.items()
        found += [p for key, p in originals if key.startswith("original") and p is not None and p.shape == shape]
    return [p for p in found if p is not None]


def remove_reparametrizations(layer: nn.Module) -> None:
    """Turn a weight that ``torch.nn.utils`` recomputes into a parameter with its current values."""
    if parametrize.is_parametrized(layer):
        _remove_parametrizations(layer)
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(layer, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        raise ValueError(
            f"the weight of this {type(layer).__name__} is not a parameter, and torch.nn.utils (prune, parametrize, "
            "weight_norm, spectral_norm) does not compute it; make it a parameter before you fold the model"
        )


def _remove_parametrizations(layer: nn.Module) -> None:
    # torch's remove_parametrizations changes the class, which a copied layer shares with the original.
    owners = dict(layer.get_submodule("parametrizations").named_children())
    values = {name: owner().detach().clone() for name, owner in owners.items()}
    del layer._modules["parametrizations"]
    layer.__class__ = type(layer).__bases__[0]
    for name, value in values.items():
        if any(True for _ in owners[name].parameters(recurse=False)):
            layer.register_parameter(name, nn.Parameter(value))
        else:
            layer.register_buffer(name, value)


def deep_copy(module: Module) -> Module:
    """``copy.deepcopy`` of a module, with detached copies of the non-leaf tensors that it holds.

    torch cannot deepcopy these. Pruning and the old weight and spectral norm set ``weight`` to one, and some networks
    keep features or attention maps of their last forward pass, also in lists and dicts. And torchvision's and timm's
    feature extractors (graphs of torch.fx) forget in copies whether they are in train or eval mode.
    """
    held = tree_leaves([vars(part) for part in module.modules()])
    copied = copy.deepcopy(module, {id(x): x.detach().clone() for x in held if isinstance(x, Tensor) and not x.is_leaf})
    copies = dict(copied.named_modules())
    for name, part in module.named_modules():
        if name in copies and hasattr(part, "training"):  # a frozen script has no mode
            copies[name].training = part.training
    return copied
