"""Which batch norms read the output channels of a layer, so that they can be folded into it or take its scale."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import StockLayer
from .channel_labels import along_dim, channel_dim, labels_behind, per_channel
from .operations import MOVES
from .trace import Op, Trace, Value


def norms_that_fold(trace: Trace, layer: StockLayer) -> list[_BatchNorm]:
    """The batch norms that fold into ``layer``, nearest first: each is the only reader of the output before it.

    Views, reshapes and transposes in between are allowed. If the layer is called several times, the result must be the
    same for all calls; otherwise none fold.
    """
    chains = [_chain(trace, layer, call.output) for call in trace.calls.get(layer, ())]
    return chains[0] if chains and all(chain == chains[0] for chain in chains) else []


def _chain(trace: Trace, layer: StockLayer, value: Value | None) -> list[_BatchNorm]:
    norms: list[_BatchNorm] = []
    dim = None if value is None else channel_dim(layer, value)
    if value is None or dim is None:
        return norms
    channels = torch.arange(1, 1 + value.shape[dim], device="cpu")  # explicit, for use within torch.device(...)
    labels = along_dim(channels, dim, value)
    while value not in trace.outputs:
        readers = [op for op in value.readers if op.reads_values]
        if len(readers) != 1:
            break
        op = readers[0]
        norm = trace.norm_of(op)
        if norm is not None and op.args[0] is value:
            order = per_channel(labels, value)
            if order is None or not torch.equal(order, channels):
                break
            norms.append(norm)
            value, labels = op.outputs[0], along_dim(channels, 1, op.outputs[0])
            continue
        moved = labels_behind(op, {value: labels}) if op.name in MOVES or op.is_alias else None
        if moved is None or len(moved) != 1:
            break
        value, labels = op.outputs[0], moved[0]
    return norms


class Scales:
    """Which channels of which batch norms can take a positive factor of each output channel of each layer.

    Args:
        trace: A recorded pass.
        layers: The layers whose outputs are scaled.

    Attributes:
        readers: For each layer, the batch norms that read its output, as ``(norm, positions, channels)``: channel
            ``positions[i]`` of the batch norm is channel ``channels[i]`` of the layer.
        leaks: The layers whose factor reaches something else than batch norms, with the reason.
    """

    def __init__(self, trace: Trace, layers: Iterable[StockLayer]):
        self.readers: dict[StockLayer, list[tuple[_BatchNorm, Tensor, Tensor]]] = {}
        self.leaks: dict[StockLayer, str] = {}
        self._trace = trace
        self._starts: dict[StockLayer, int] = {}
        self._labels: dict[Value, Tensor] = {}  # see channel_labels; 0 for elements without a factor
        self._read: dict[_BatchNorm, list[Tensor]] = {}
        start = 1
        for layer in layers:
            self._starts[layer] = start
            start += layer.weight.shape[0]
            for call in trace.calls.get(layer, ()):
                self._begin(layer, call.output)
        for op in trace.ops:
            if op.reads_values and any(value in self._labels for value in op.inputs):
                self._pass_on(op)
        for value in trace.outputs:
            if value in self._labels:
                self._leak(self._labels[value], "it is an output of the network")
        self._match()

    def _begin(self, layer: StockLayer, out: Value | None) -> None:
        dim = None if out is None else channel_dim(layer, out)
        if out is None or dim is None:
            self.leaks.setdefault(layer, f"its output has shape {None if out is None else tuple(out.shape)}")
            return
        first = self._starts[layer]
        self._labels[out] = along_dim(torch.arange(first, first + out.shape[dim], device="cpu"), dim, out)

    def _pass_on(self, op: Op) -> None:
        labels = {value: self._labels[value] for value in op.inputs if value in self._labels}
        norm = self._trace.norm_of(op)
        if norm is not None and op.args[0] in labels:
            self._absorb(norm, op.args[0], labels[op.args[0]])
            return
        moved = labels_behind(op, labels)
        if moved is None:
            for label in labels.values():
                self._leak(label, f"its output goes into {op.name!r}")
            return
        self._labels.update((out, label) for out, label in zip(op.outputs, moved, strict=False) if label.any())

    def _absorb(self, norm: _BatchNorm, value: Value, labels: Tensor) -> None:
        if norm.running_mean is None:
            self._leak(labels, "its batch norm has no running statistics")
        channels = per_channel(labels, value)
        if channels is None:
            self._leak(labels, "a channel of its batch norm contains several of its channels")
        elif not any(torch.equal(channels, other) for other in self._read.setdefault(norm, [])):
            self._read[norm].append(channels)

    def _leak(self, labels: Tensor, why: str) -> None:
        for layer in self._layers_in(labels):
            self.leaks.setdefault(layer, why)

    def _layers_in(self, labels: Tensor) -> list[StockLayer]:
        return [layer for layer in self._starts if self._of_layer(layer, labels).any()]

    def _of_layer(self, layer: StockLayer, labels: Tensor) -> Tensor:
        first = self._starts[layer]
        return (labels >= first) & (labels < first + layer.weight.shape[0])

    def _match(self) -> None:
        for norm, inputs in self._read.items():
            for labels in inputs:
                if len(inputs) > 1:
                    self._leak(labels, "its batch norm is used in several places")
                for layer in self._layers_in(labels):
                    positions = self._of_layer(layer, labels).nonzero().flatten()
                    channels = labels[positions] - self._starts[layer]
                    self.readers.setdefault(layer, []).append((norm, positions, channels))
