"""All effective weights of a network at once, before its forward pass needs the first of them.

A layer's own computation is about ten operations, which on a GPU cost the host more time than the GPU. Together, the
layers of a network take a few operations for each length of rows (:mod:`enc_plugin.functional.grouped`). With Triton,
eq. 21 and 22 take one launch forward and two backward (:mod:`enc_plugin.triton_rows`).
"""

from __future__ import annotations

import importlib
import weakref
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, distributed, nn

from .forward_pass import can_precompute, close_pass, open_pass
from .functional.grouped import enc_weights
from .layers import ENC_LAYERS, ENCLayer

# With several processes, the weights are computed in parts of about one bucket of DistributedDataParallel. The
# gradients of a part come together, and are exchanged while those of earlier layers are computed.
_PART_BYTES = 25 * 2**20


def pack_weights(model: nn.Module, packed: bool | str = "auto") -> None:
    """Say whether forward passes of ``model`` compute the weights of its ENC layers together; the weights are equal.

    They are equal to rounding, and so are the gradients. :func:`enc_plugin.to_enc` calls this; call it yourself for a
    network that is built of ENC layers, or to change your mind. Each layer computes its own weight, as without this,

    - under ``torch.compile``, export, tracing and ``torch.func`` transforms, in activation checkpointing, and where
      autocast or grad mode is not that of the network's call;
    - if it is called on its own, in a part of the network, or in another CUDA stream than the first layer;
    - if its weight is frozen, pruned, parametrized, sharded or has hooks, or if the layer has forward pre-hooks.

    A pass sees changes of weights before its first layer runs, and those that torch counts (in-place operations under
    ``no_grad``) until the layer is called. Only writes to ``weight.data`` of a trained layer in the middle of a pass
    act from the next pass on.

    Args:
        model: The network, as it is called. ``DistributedDataParallel`` may wrap it later.
        packed: True, False, or ``'auto'``: for weights on CUDA devices. On a CPU, operations cost little and a common
            copy of the weights costs more. Needs torch 2.8; with an older one, layers compute their own.

    Raises:
        ValueError: If ``packed`` is something else.
    """
    check_packed(packed)
    unpack_weights(model)
    packing = _Packing(packed)
    model.register_forward_pre_hook(packing.before)
    # After errors, too.
    model.register_forward_hook(packing.after, always_call=True)


def unpack_weights(model: nn.Module) -> None:
    """Take off all that :func:`pack_weights` has put on ``model`` and its parts."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def is_packing_chosen(model: nn.Module) -> bool:
    """Whether :func:`pack_weights` was called for ``model`` or a part of it, whatever it was told."""
    return any(_is_ours(hook) for module in model.modules() for hook in module._forward_pre_hooks.values())


def check_packed(packed: bool | str) -> None:
    """Raise ``ValueError`` unless ``packed`` is True, False or ``'auto'``."""
    if not isinstance(packed, bool) and not (isinstance(packed, str) and packed == "auto"):
        raise ValueError(f"packed: expected 'auto', True or False, got {packed!r}")


def _is_ours(hook) -> bool:
    return isinstance(getattr(hook, "__self__", None), _Packing)


class _Packing:
    """Hooks around the forward pass of a network. They know nothing of its layers, so that copies may share them."""

    def __init__(self, packed: bool | str):
        self.packed = packed

    def before(self, model: nn.Module, args: tuple) -> None:
        """As the forward pre-hook."""
        if not self.packed or not can_precompute():
            return
        layers = (module for module in model.modules() if isinstance(module, ENCLayer) and not module.enc_is_projected)
        first = next(layers, None)
        if first is not None and (self.packed is True or any(weight.is_cuda for weight in first.free_weights())):
            open_pass(model, _Weights([first, *layers]))

    def after(self, model: nn.Module, args: tuple, output: object) -> None:
        """As the forward hook; after an error, ``output`` is None."""
        if not torch.compiler.is_compiling():
            weights = close_pass(model)
            if weights is not None and output is not None:
                weights.leave_out_unused()


# Layers that the last pass did not call. Their weights are not computed in advance until they are called again.
_unused: weakref.WeakSet[ENCLayer] = weakref.WeakSet()


class _Weights:
    """Effective weights of one forward pass, computed part by part when a layer asks for the first of a part."""

    def __init__(self, layers: list[ENCLayer]):
        self.parts = {layer: part for part in map(_Part, _in_parts(layers)) for layer in part.layers}

    def weight_of(self, layer: ENCLayer) -> Tensor | None:
        """The weight of ``layer``, or None if it is to compute its own."""
        part = self.parts.get(layer)
        return None if part is None else part.weight_of(layer)

    def leave_out_unused(self) -> None:
        """Do not compute for the next pass what no layer has taken in this one."""
        for part in set(self.parts.values()):
            _unused.update(part.found.keys() - part.taken)


class _Part:
    """Layers whose weights are computed together."""

    def __init__(self, layers: list[ENCLayer]):
        self.layers = layers
        self.is_computed = False
        self.found: dict[ENCLayer, tuple[list[Tensor], list[tuple], Tensor]] = {}
        self.taken: set[ENCLayer] = set()

    def weight_of(self, layer: ENCLayer) -> Tensor | None:
        if not self.is_computed:
            self.is_computed = True  # also if it fails
            self._compute([x for x in self.layers if x not in _unused and _can_be_packed(x)])
        _unused.discard(layer)
        if layer not in self.found:
            return None
        _, state, weight = self.found[layer]
        if _state(_sources(layer)) != state:
            return None
        self.taken.add(layer)
        return weight

    def _compute(self, layers: list[ENCLayer]) -> None:
        groups = defaultdict(list)
        for layer in layers:
            weight = layer._parameters["weight"]
            groups[layer.enc_variant, weight.device, weight.dtype, _result_dtype(layer)].append(layer)
        for (variant, _, _, dtype), members in groups.items():
            sources = [_sources(layer) for layer in members]
            states = [_state(tensors) for tensors in sources]
            whats = _together([x[0] for x in sources], variant, [layer.enc_alpha for layer in members], dtype)
            # The sources are kept, so that no other tensor can have their ids.
            self.found |= zip(members, zip(sources, states, whats, strict=True), strict=True)


def _together(weights: list[Tensor], variant: str, alphas: list[float | Tensor], dtype: torch.dtype) -> list[Tensor]:
    kernels = _triton_rows() if weights[0].is_cuda else None
    if kernels is not None and kernels.can_take(weights, variant, dtype):
        return kernels.triton_weights(weights, variant, alphas, dtype)
    return enc_weights(weights, variant, alphas, dtype)


@cache
def _triton_rows() -> ModuleType | None:
    """The kernels, or None without Triton."""
    try:
        return importlib.import_module(".triton_rows", __package__)
    except ImportError:
        return None


def _in_parts(layers: list[ENCLayer]) -> Iterator[list[ENCLayer]]:
    is_exchanged = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    part, size = [], 0
    for layer in layers:
        part.append(layer)
        size += sum(weight.nbytes for weight in layer.free_weights())
        if is_exchanged and size >= _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _sources(layer: ENCLayer) -> list[Tensor]:
    """The tensors that the effective weight is computed from."""
    return [x for x in (layer._parameters.get("weight"), layer.enc_log_alpha) if x is not None]


def _state(tensors: list[Tensor]) -> list[tuple]:
    """What is another one if the tensors have changed, or if another stream asks, which would have to wait."""
    return [
        (id(x), x._version, x.data_ptr(), torch.cuda.current_stream(x.device) if x.is_cuda else None) for x in tensors
    ]


def _can_be_packed(layer: ENCLayer) -> bool:
    """Whether nothing but counted changes can change the weight before the layer is called, and nothing else wants it.

    Frozen weights are often averages of others, written through ``.data`` within the pass. Hooks of weights expect to
    be called with a gradient, which there is none of for a layer that this pass does not call.
    """
    return (
        type(layer).effective_weight is ENCLayer.effective_weight
        and "weight" in layer._parameters
        and not layer._forward_pre_hooks
        and all(map(_is_plain_and_trained, _sources(layer)))
    )


def _is_plain_and_trained(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)  # not sharded, fake, traced, ...
        and tensor.requires_grad
        and not tensor.is_inference()
        and not tensor._backward_hooks
        and not getattr(tensor, "_post_accumulate_grad_hooks", None)
        and tensor.untyped_storage().nbytes() >= tensor.nbytes > 0  # not freed by a wrapper until the layer is called
        and not tensor.is_meta
    )


def _result_dtype(layer: ENCLayer) -> torch.dtype:
    """What autocast would cast the weight to; a class of someone else's may do more with it before that."""
    weight = layer._parameters["weight"]
    device = weight.device.type
    is_cast = type(layer) in ENC_LAYERS.values() and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast and weight.dtype != torch.float64 else weight.dtype
