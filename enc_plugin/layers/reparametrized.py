"""Layers whose weight ``torch.nn.utils`` has replaced: pruning, parametrizations, weight norm and spectral norm."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# Keys of a weight in a state dict: its own, and those that torch.nn.utils gives it.
WEIGHT_KEYS = ("weight", "weight_orig", "weight_v", *(f"parametrizations.weight.original{i}" for i in ("", "0", "1")))


def free_weights(layer: nn.Module) -> list[nn.Parameter]:
    """The tensors that an optimizer owns in the place of ``layer.weight``, shaped like it.

    It is ``[weight]``, but for ``torch.nn.utils``: pruning and the old spectral norm keep ``weight_orig``, the old
    weight norm ``weight_v``, a parametrization ``parametrizations.weight.original`` (or ``original0``, ...).
    """
    found = [layer._parameters.get(key) for key in ("weight", "weight_orig", "weight_v")]
    if parametrize.is_parametrized(layer, "weight"):
        shape = layer.weight.shape
        originals = layer.get_submodule("parametrizations.weight")._parameters.items()
        found += [p for key, p in originals if key.startswith("original") and p is not None and p.shape == shape]
    return [p for p in found if p is not None]


def remove_reparametrizations(layer: nn.Module) -> None:
    """Make the weight a parameter again where ``torch.nn.utils`` has replaced it, with the values that it has."""
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
            f"the weight of this {type(layer).__name__} is no parameter, and not made by torch.nn.utils (prune, "
            "parametrize, weight_norm, spectral_norm); make it a parameter before you fold the model"
        )


def _remove_parametrizations(layer: nn.Module) -> None:
    # Not by torch's remove_parametrizations: it changes the class, which a copied layer shares with its original.
    owners = dict(layer.get_submodule("parametrizations").named_children())
    values = {name: owner().detach().clone() for name, owner in owners.items()}
    del layer._modules["parametrizations"]
    layer.__class__ = type(layer).__bases__[0]
    for name, value in values.items():
        if any(True for _ in owners[name].parameters(recurse=False)):
            layer.register_parameter(name, nn.Parameter(value))
        else:
            layer.register_buffer(name, value)


def copies_of_results(modules: Iterable[nn.Module]) -> dict[int, Tensor]:
    """A memo for ``copy.deepcopy``: copies of the weights that a forward pass has left behind as results.

    Pruning and the old weight and spectral norm set ``weight`` to a result of autograd, which torch refuses to copy.
    """
    results = (value for module in modules for value in vars(module).values() if isinstance(value, Tensor))
    return {id(value): value.detach().clone() for value in results if not value.is_leaf}
