"""Which layers can be ENC and which of them need a batch norm of their own: by what the network is seen to do."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import StockLayer
from .recording import RecordError, record_forward
from .scale_fate import fate
from .scale_paths import norms_that_fold
from .trace import Trace

# Squeeze-and-excitation blocks by their class names in mmpretrain, mmcv, timm and torchvision: the guess where a
# network does not run.
_SE_BLOCK = re.compile(r"^(Effective)?SE(Layer|Module|Block|Unit)|SqueezeExcit")
_MOST_PARTS = 64


class Evidence:
    """What a network is seen to do with its layers, and the guesses where it is not seen.

    The network runs once in eval mode, and once more in train mode if some of its layers did not run (auxiliary
    classifiers). If it does not run, those of its parts that do are looked at. The guesses: a layer computes with its
    weight itself; a batch norm reads a layer if it follows in an ``nn.Sequential``.

    Args:
        model: The network; it is left as it was.
        example: A batch that it takes, as for :func:`.recording.record_forward`; None: one is made up.

    Attributes:
        trace: The pass of the whole network in eval mode, or None.
        failure: Why there is none, in words.

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
            if any(self._trace_of(layer) is None and not self._readers(layer) for layer in self._layers.values()):
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
        return [reader for trace in (*self._whole, *self._parts) for reader in trace.readers(layer)]

    def read_elsewhere(self) -> dict[str, str]:
        """The layers whose weight something else computes with, too, by name, with the reason in words."""
        found, shared = {}, set()
        for name, layer in self._layers.items():
            for reader in self._readers(layer):
                found[name] = _reason(layer, reader)
                shared.add(id(layer._parameters["weight"]))
        for name, layer in self._layers.items():  # their weight is one and the same
            if id(layer._parameters.get("weight")) in shared:
                found.setdefault(name, "it shares its weight with a layer that has to stay plain")
        return {name: found[name] for name in self._layers if name in found}

    def guessed(self) -> dict[str, str]:
        """The layers that no pass of the whole network has called, by name, with what is taken for granted."""
        if self.failure is not None:
            return dict.fromkeys(self._layers, "the network did not run: taken as computing with its own weight")
        seen = {name for name, layer in self._layers.items() if self._trace_of(layer) is not None}
        return {
            name: "it did not run on the example: taken as computing with its own weight"
            for name, layer in self._layers.items()
            if name not in seen and not self._readers(layer)
        }

    def wants_norm(self) -> set[nn.Module]:
        """The layers that need a batch norm of their own: those that give one vector a sample, unless one reads it.

        These are the linear layers and the convolutions that do the same: on maps of one pixel, as in
        squeeze-and-excitation blocks and convolutional classifiers, or in front of the last pooling.
        """
        guesses = self._guessed_wants()
        wants: set[nn.Module] = set()
        for layer in self._layers.values():
            trace = self._trace_of(layer)
            if trace is not None:
                due = _needs_norm(trace, layer)
            else:
                due = layer in guesses and not any(norms_that_fold(part, layer) for part in self._parts)
            if due:
                wants.add(layer)
        return wants

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
        """Names of the layers whose scale no norm undoes, in front of another weight or of the network's end.

        Args:
            owns_norm: The layers that have, or will have, a batch norm of their own.
        """
        found = []
        has_norms = any("norm" in type(module).__name__.lower() for module in self.model.modules())
        for name, layer in self._layers.items():
            trace = self._trace_of(layer)
            if layer in owns_norm:
                continue
            if not has_norms or (trace is not None and not fate(trace, layer, norms_due=owns_norm).undone):
                found.append(name)
        return found


def refuse_weights_read_elsewhere(model: nn.Module, trace: Trace, layers: dict[str, nn.Module]) -> None:
    """Raise ``ValueError`` if something else computes with the free weight of an ENC layer.

    Args:
        model: The network.
        trace: A recorded pass of it.
        layers: Its ENC layers by name.
    """
    for name, layer in layers.items():
        for reader in trace.readers(layer):
            raise ValueError(
                f"layer {name!r} of {type(model).__name__} is ENC, but {_reason(layer, reader)}: that computes with "
                "the free weight, which the constraint does not hold and fold does not keep; leave the layer plain "
                f"with exclude=[{name!r}]"
            )


def _reason(layer: nn.Module, reader: nn.Module) -> str:
    if any(parameter is layer._parameters["weight"] for parameter in reader._parameters.values()):
        return f"its weight is that of {type(reader).__name__} too"
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
