"""Which layers can be ENC and which of them need a post-norm, according to a recorded forward pass."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import StockLayer, enc_layers
from .recording import RecordError, record_forward
from .scale_fate import fate
from .scale_paths import norms_that_fold
from .trace import Trace

# Class names of squeeze-and-excitation blocks in mmpretrain, mmcv, timm and torchvision, for networks that do not run.
_SE_BLOCK = re.compile(r"^(Effective)?SE(Layer|Module|Block|Unit)|SqueezeExcit")
_MOST_PARTS = 64


class Evidence:
    """How a network uses its layers: recorded in forward passes where possible, guessed otherwise.

    The network runs once in eval mode, and once more in train mode if some of its layers did not run (auxiliary
    classifiers). If the network does not run, its submodules are tried. The guesses are: only modules that hold a
    layer's weight use it; a batch norm reads a layer's output if it directly follows the layer in an ``nn.Sequential``.

    Args:
        model: The network; it does not change.
        example: An input batch, as for :func:`.recording.record_forward`; None: one is generated.

    Attributes:
        trace: The recorded pass of the whole network in eval mode, or None.
        failure: The reason if there is no trace.

    Raises:
        RecordError: If the network does not run on ``example``.
    """

    def __init__(self, model: nn.Module, example: Any = None):
        self.model = model
        self.trace: Trace | None = None
        self.failure: str | None = None
        self._layers = {name: module for name, module in model.named_modules() if isinstance(module, StockLayer)}
        self._whole: list[Trace] = []
        self._parts: list[Trace] = []
        if not self._layers:
            return
        try:
            self.trace = record_forward(model, example)
            self._whole = [self.trace]
            if self.guessed():
                with suppress(RecordError):
                    self._whole.append(record_forward(model, example, training=True))
        except RecordError as error:
            if example is not None:
                raise
            self.failure = str(error)
            self._record_parts(model)

    def _record_parts(self, module: nn.Module) -> None:
        for child in module.children():
            if not any(child.children()) or len(self._parts) >= _MOST_PARTS:
                continue
            try:
                self._parts.append(record_forward(child))
            except RecordError:
                self._record_parts(child)

    def _trace_of(self, layer: nn.Module) -> Trace | None:
        return next((trace for trace in self._whole if layer in trace.calls), None)

    def _readers(self, layer: nn.Module) -> list[nn.Module]:
        found = [reader for trace in (*self._whole, *self._parts) for reader in trace.readers(layer)]
        weight = layer._parameters.get("weight")
        if found or weight is None or self._trace_of(layer) is not None:
            return found
        # A module that holds the weight, such as the embedding that a decoder is tied to, is assumed to use it.
        others = (module for module in self.model.modules() if not isinstance(module, StockLayer))
        return [module for module in others if any(p is weight for p in module._parameters.values())]

    def read_elsewhere(self) -> dict[str, str]:
        """The layers whose weight another module also computes with, by name, with the reason."""
        found, shared = {}, set()
        for name, layer in self._layers.items():
            for reader in self._readers(layer):
                found[name] = _reason(layer, reader)
                shared.add(id(layer._parameters["weight"]))
        for name, layer in self._layers.items():
            if id(layer._parameters.get("weight")) in shared:
                found.setdefault(name, "it shares its weight with a layer that must stay plain")
        return {name: found[name] for name in self._layers if name in found}

    def guessed(self) -> dict[str, str]:
        """The layers that no pass of the whole network has called, by name, with the assumption about them."""
        assumption = "no other module is assumed to use its weight"
        if self.failure is not None:
            return dict.fromkeys(self._layers, f"the network did not run: {assumption}")
        return {
            name: f"it did not run on the example: {assumption}"
            for name, layer in self._layers.items()
            if self._trace_of(layer) is None and not self._readers(layer)
        }

    def wants_norm(self) -> set[nn.Module]:
        """The layers that need a post-norm: those with one output vector per sample, unless a batch norm follows.

        These are the linear layers, and convolutions that are used like them: on maps of one pixel
        (squeeze-and-excitation blocks, convolutional classifiers) or before the last pooling.
        """
        guesses = self._guessed_wants()

        def is_due(layer: StockLayer) -> bool:
            if (trace := self._trace_of(layer)) is not None:
                return _needs_norm(trace, layer)
            return layer in guesses and not any(norms_that_fold(part, layer) for part in self._parts)

        return {layer for layer in self._layers.values() if is_due(layer)}

    def _guessed_wants(self) -> set[nn.Module]:
        wants: set[nn.Module] = {layer for layer in self._layers.values() if isinstance(layer, nn.Linear)}
        for module in self.model.modules():
            if _SE_BLOCK.search(type(module).__name__):
                wants.update(m for m in module.modules() if isinstance(m, StockLayer))
        for module in self.model.modules():
            if isinstance(module, nn.Sequential):
                children = list(module)
                wants -= {a for a, b in zip(children, children[1:], strict=False) if isinstance(b, _BatchNorm)}
        return wants

    def without_norm(self, owns_norm: set[nn.Module]) -> list[str]:
        """Names of the layers with no norm that undoes their scale before the next weight or the network's output.

        Args:
            owns_norm: The layers that have, or will have, a post-norm.
        """
        found = []
        has_norms = any("norm" in type(module).__name__.lower() for module in self.model.modules())
        for name, layer in self._layers.items():
            if layer in owns_norm:
                continue
            trace = self._trace_of(layer)
            if not has_norms or (trace is not None and not fate(trace, layer, norms_due=owns_norm).undone):
                found.append(name)
        return found


def refuse_weights_read_elsewhere(model: nn.Module, trace: Trace) -> None:
    """Raise ``ValueError`` if another module computes with the free weight of an ENC layer.

    Args:
        model: The network.
        trace: A recorded forward pass of ``model``.
    """
    for name, layer in enc_layers(model):
        for reader in trace.readers(layer):
            raise ValueError(
                f"layer {name!r} of {type(model).__name__} is ENC, but {_reason(layer, reader)}, so that module "
                "computes with the free weight, which does not satisfy the constraint and is lost in fold; leave "
                f"the layer plain with exclude=[{name!r}]"
            )


def _reason(layer: nn.Module, reader: nn.Module) -> str:
    if any(parameter is layer._parameters["weight"] for parameter in reader._parameters.values()):
        return f"it shares its weight with {type(reader).__name__}"
    return f"{type(reader).__name__} reads its weight without calling it"


def _needs_norm(trace: Trace, layer: StockLayer) -> bool:
    if norms_that_fold(trace, layer):
        return False
    if isinstance(layer, nn.Linear):
        return True
    end = fate(trace, layer, through_layers=False)
    outputs = [call.output for call in trace.calls[layer] if call.output is not None]
    if all(len(out.shape) == layer.weight.ndim and all(side == 1 for side in out.shape[2:]) for out in outputs):
        return not end.undone
    classes = layer.weight.shape[0]
    is_classifier = all(len(out.shape) == 2 and out.shape[1] == classes for out in end.outputs)
    return bool(end.outputs) and end.lost_in is None and is_classifier
