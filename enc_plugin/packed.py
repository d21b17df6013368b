"""Computes all effective weights of a network together, at the start of a forward pass.

Computed one by one, each weight takes about ten operations, whose launches cost more than their work on a GPU.
Computed together, all layers take a few operations per row length (:mod:`enc_plugin.functional.grouped`). With Triton,
they take one launch forward and two backward, or three and four for the whole-layer variants
(:mod:`enc_plugin.kernels.triton_weights`).
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .forward_pass import can_precompute, close_pass, open_pass
from .functional.checks import check_auto
from .kernels.together import effective_weights
from .layers import ENC_LAYERS, ENCLayer

# With several processes, the weights are computed in parts of about one bucket of DistributedDataParallel, so that the
# gradients of one part are exchanged while those of earlier layers are computed.
_PART_BYTES = 25 * 2**20

_OWN_LAYERS = frozenset(ENC_LAYERS.values())

# The address of the current stream of a device: torch.cuda.current_stream takes as long as launching a kernel.
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream)


def pack_weights(model: nn.Module, packed: bool | str = "auto") -> None:
    """Choose whether forward passes of ``model`` compute the weights of its ENC layers together.

    Weights and gradients are the same up to rounding. :func:`enc_plugin.to_enc` calls this function; call it yourself
    for a network that you built from ENC layers, or to change the setting. A layer still computes its own weight

    - under ``torch.compile``, export, tracing and ``torch.func`` transforms, in activation checkpointing, and if
      autocast or grad mode differ from those of the network's call;
    - if it is called alone, in a part of the network, or in another CUDA stream than the first layer;
    - if its weight is frozen, pruned, parametrized, sharded, has hooks or is on another type of device than the first
      one, or if the layer has forward pre-hooks.

    Changes of a weight during a forward pass have an effect in the same pass if torch counts them (in-place operations
    under ``no_grad``). Only writes to ``weight.data`` of a trained layer, once the first layer has run, have an effect
    from the next pass on.

    Args:
        model: The network that is called. ``DistributedDataParallel`` may wrap it later.
        packed: True, False, or ``'auto'``: only for weights on CUDA devices. On a CPU, operations cost little, and the
            common copy of the weights costs more than it saves. Needs torch 2.8; with older versions each layer
            computes its own weight.

    Raises:
        ValueError: If ``packed`` is neither True, False nor ``'auto'``.
    """
    check_auto("packed", packed)
    unpack_weights(model)
    packing = _Packing(packed)
    model.register_forward_pre_hook(packing.before)
    model.register_forward_hook(packing.after, always_call=True)  # also called after errors


def unpack_weights(model: nn.Module) -> None:
    """Remove the hooks of :func:`pack_weights` from ``model`` and its submodules."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def is_packing_chosen(model: nn.Module) -> bool:
    """Whether :func:`pack_weights` was called for ``model`` or a submodule, with any value of ``packed``."""
    return any(_is_ours(hook) for module in model.modules() for hook in module._forward_pre_hooks.values())


def _is_ours(hook: object) -> bool:
    return isinstance(getattr(hook, "__self__", None), _Packing)


class _Packing:
    """Hooks around the forward pass of a network. Copies of the network have their own."""

    # A network and its ENC layers. Searching all modules takes as long as launching some hundred kernels.
    known: tuple[weakref.ref[nn.Module], list[weakref.ref[nn.Module]]] | None = None

    def __init__(self, packed: bool | str):
        self.packed = packed

    def __reduce__(self) -> tuple:
        return _Packing, (self.packed,)

    def before(self, model: nn.Module, args: tuple) -> None:
        """Forward pre-hook: begin a pass."""
        if not self.packed or not can_precompute():
            return
        known = self.known  # another thread may set it meanwhile
        if known is None or known[0]() is not model:  # shallow copies share their hooks
            known = weakref.ref(model), [weakref.ref(x) for x in model.modules() if isinstance(x, ENCLayer)]
            self.known = known
        # A layer may have become plain, or projected, since the last pass.
        layers = [
            layer for reference in known[1] if isinstance(layer := reference(), ENCLayer) and not layer.enc_is_projected
        ]
        weights = (layer._parameters.get("weight") for layer in layers)
        # Autocast has a mode for each type of device, so only weights on one type are computed together.
        device_type = next((w.device.type for w in weights if w is not None and not w.is_meta), None)
        if device_type == "cuda" or (device_type is not None and self.packed is True):
            open_pass(model, _Weights(layers, device_type))

    def after(self, model: nn.Module, args: tuple, output: object) -> None:
        """Forward hook: end the pass; after an error, ``output`` is None."""
        if not torch.compiler.is_compiling():
            weights = close_pass(model)
            if weights is not None and output is not None:
                _unused.update(weights.untaken)
                if weights.has_met_others:
                    self.known = None  # a layer may have been added: search again


# Layers that the last pass did not call. Their weights are not precomputed until they are called again.
_unused: weakref.WeakSet[ENCLayer] = weakref.WeakSet()


class _Weights:
    """Effective weights of one forward pass. Each part is computed when the first of its layers runs."""

    def __init__(self, layers: list[ENCLayer], device_type: str):
        self.device_type = device_type
        self.parts = list(_in_parts(layers))  # that are not yet computed
        # For layers of the other parts: free weight and alpha, their state, and the effective weight; None if the layer
        # has to compute it.
        self.found: dict[ENCLayer, tuple[tuple, tuple, Tensor] | None] = {}
        self.untaken: set[ENCLayer] = set()  # layers whose weight was computed, and that did not run
        self.has_met_others = False  # whether a layer ran that is in no part

    def weight_of(self, layer: ENCLayer) -> Tensor | None:
        """Effective weight of ``layer``, or None if the layer has to compute it."""
        if layer not in self.found:
            part = next((part for part in self.parts if layer in part), None)
            if part is None:
                self.has_met_others = True
                return None
            self.parts.remove(part)
            self._compute(part)
        found = self.found[layer]
        if found is None:
            _unused.discard(layer)
            return None
        _, state, weight = found
        if _state(layer) != state:
            return None
        self.untaken.discard(layer)
        return weight

    def _compute(self, part: list[ENCLayer]) -> None:
        self.found |= dict.fromkeys(part)  # even if the computation raises
        unused, groups = set(_unused), defaultdict(list)
        for layer in part:
            if layer in unused or not _can_be_packed(layer):
                continue
            weight = _weight(layer)
            if weight.device.type == self.device_type:
                groups[layer.enc_variant, weight.device, weight.dtype, type(layer) in _OWN_LAYERS].append(layer)
        for (variant, device, dtype, is_own), members in groups.items():
            # Subclasses may use the weight before autocast casts it.
            dtype = _cast_dtype(device.type, dtype) if is_own else dtype
            # Keeping the sources alive ensures that no other tensor gets their ids, which _state compares.
            sources = [(_weight(layer), layer.enc_log_alpha) for layer in members]
            states = [_state(layer) for layer in members]
            alphas = [layer.enc_alpha for layer in members]
            whats = effective_weights([weight for weight, _ in sources], variant, alphas, dtype)
            self.found |= zip(members, zip(sources, states, whats, strict=True), strict=True)
            self.untaken.update(members)


def _in_parts(layers: list[ENCLayer]) -> Iterator[list[ENCLayer]]:
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        yield layers
        return
    part, size = [], 0
    for layer in layers:
        part.append(layer)
        size += sum(weight.nbytes for weight in layer.free_weights())
        if size >= _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _state(layer: ENCLayer) -> tuple:
    """Value that differs if a tensor has changed, or on another CUDA stream, which would have to wait."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return ()
    stream = _stream(weight.get_device()) if weight.is_cuda else None
    state = stream, id(weight), weight._version, weight.data_ptr()
    alpha = layer.enc_log_alpha
    return state if alpha is None else (*state, id(alpha), alpha._version, alpha.data_ptr())


def _weight(layer: ENCLayer) -> Any:
    """The parameter itself, and not the attribute ``weight``, which pruning and parametrization replace."""
    return layer._parameters["weight"]


def _can_be_packed(layer: ENCLayer) -> bool:
    """Whether the weight of ``layer`` may be precomputed: nothing can change it unseen before the layer is called.

    Frozen weights are excluded because they are often averages of others, written through ``.data`` during the pass.
    Weights with hooks are excluded because a hook expects a gradient, and a layer that the pass does not call has none.
    """
    weight, log_alpha = layer._parameters.get("weight"), layer.enc_log_alpha
    return (
        weight is not None
        and _is_plain_and_trained(weight)
        and (log_alpha is None or _is_plain_and_trained(log_alpha))
        and not layer._forward_pre_hooks
        and type(layer).effective_weight is ENCLayer.effective_weight
    )


def _is_plain_and_trained(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)  # no subclass: sharded, fake, traced, ...
        and tensor.requires_grad
        and not tensor.is_inference()
        and not tensor._backward_hooks
        and not tensor._post_accumulate_grad_hooks
        and tensor.untyped_storage().nbytes() >= tensor.nbytes > 0  # some wrappers free weights between uses
        and not tensor.is_meta
    )


def _cast_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype to which autocast casts a weight."""
    is_cast = torch.is_autocast_enabled(device_type) and dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if is_cast else dtype
