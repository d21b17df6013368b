"""Questions to a recorded pass: what undoes the scale of a layer's output, and along which path a scale can be kept."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from .trace import Op, Trace, Value

# Operations that move elements and change none. The same operation moves the labels of the elements.
_MOVES = {
    *("view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand"),
    *("select", "slice", "split", "split_with_sizes", "unbind", "cat", "stack", "flip", "roll", "repeat"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "constant_pad_nd"),
}
# For a factor s > 0: f(s x) = s f(x), element by element;
_ELEMENTWISE = {"relu", "leaky_relu", "_prelu_kernel", "native_dropout", "abs", "neg"}
_ELEMENTWISE |= {"clone", "detach", "alias", "_to_copy", "lift_fresh"}
# for all positions of a channel together (max pooling pads with -inf, average pooling with zeros or not at all);
_POOLS = {
    *(f"{kind}_pool{d}d{end}" for kind in ("max", "avg") for d in (1, 2, 3) for end in ("", "_with_indices")),
    *(f"{start}adaptive_{kind}_pool{d}d" for start in ("", "_") for kind in ("max", "avg") for d in (1, 2, 3)),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
}
_REDUCTIONS = {"mean", "sum", "amax", "amin"}  # and over whole dimensions.
_HOMOGENEOUS = _MOVES | _ELEMENTWISE | _POOLS | _REDUCTIONS
_HOMOGENEOUS |= {"max", "min", "cumsum", "index", "linalg_vector_norm", "std"}
_WEIGHTED = {"convolution": 2, "addmm": 0, "baddbmm": 0, "addmv": 0, "mm": None, "bmm": None, "mv": None, "dot": None}
_NORMS = ("batch_norm", "native_layer_norm", "native_group_norm", "rms_norm", "local_response_norm")
_TINY = 1e-2  # an eps that keeps a denominator from zero; not a part of the signal


# --- does a norm undo the scale? -----------------------------------------------------------------------------------


@dataclass
class Fate:
    """Where the scale of a layer's output ends up.

    Attributes:
        outputs: The network's outputs that it reaches.
        lost_in: The first operation that does not pass a factor on and does not undo it either, or None.
    """

    outputs: list[Value] = field(default_factory=list)
    lost_in: Op | None = None

    @property
    def undone(self) -> bool:
        """Whether norms undo it on all of its paths."""
        return not self.outputs and self.lost_in is None


def fate(trace: Trace, layer: nn.Module, through_layers: bool = True, norms_due=frozenset()) -> Fate:
    """Follow a factor of the outputs of ``layer``: operation by operation, by its degree of homogeneity.

    A norm makes the degree 0, whether it is one operation or several (``x / x.norm()``).

    Args:
        trace: A recorded pass in which ``layer`` was called.
        layer: A convolution or linear layer.
        through_layers: Follow the factor through other layers without a bias, too: they pass it on.
        norms_due: Layers that will have a norm of their own, which undoes what reaches them.
    """
    found = Fate()
    outputs = set(trace.outputs)
    degrees: dict[Value, float] = {}
    queue: list[tuple[int, Op]] = []
    queued: set[int] = set()

    def reach(value: Value, degree: float) -> None:
        degrees[value] = degree
        if value in outputs:
            found.outputs.append(value)
        for op in value.readers:
            if op.index not in queued:
                queued.add(op.index)
                heapq.heappush(queue, (op.index, op))

    for call in trace.calls.get(layer, ()):
        if call.output is not None:
            reach(call.output, 1.0)
    while queue:
        op = heapq.heappop(queue)[1]
        if through_layers and any(module in norms_due for module in op.inside):
            continue
        made = _degrees(op, degrees, through_layers)
        if made is None:
            found.lost_in = op
            return found
        for value, degree in zip(op.outputs, made, strict=False):
            if abs(degree) > 1e-9:
                reach(value, degree)
    return found


def _degrees(op: Op, degrees: dict[Value, float], through_layers: bool) -> list[float] | None:
    """Degree of homogeneity of each output, or None where there is none."""
    name = op.name.rstrip("_") if op.name.endswith("_") else op.name
    known = [degrees[value] for value in op.inputs if value in degrees]
    same = known[0] if len(set(known)) == 1 else None

    def of(i: int) -> float:
        return degrees.get(op.args[i], 0.0) if i < len(op.args) and isinstance(op.args[i], Value) else 0.0

    degree: float | None = None
    if not op.reads_values:
        degree = 0.0
    elif any(norm in name for norm in _NORMS):
        degree = 0.0 if op.args[0] in degrees else None
    elif name in ("mul", "div"):
        degree = of(0) + of(1) if name == "mul" else of(0) - of(1)
    elif name in ("add", "sub"):
        degree = _degree_of_sum(op, degrees, same)
    elif name in _WEIGHTED:
        degree = _degree_of_product(op, _WEIGHTED[name], degrees, through_layers)
    elif name in ("rsqrt", "sqrt", "reciprocal", "pow"):
        exponents = {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0, "pow": op.args[1] if len(op.args) > 1 else None}
        exponent = exponents[name]
        degree = of(0) * exponent if isinstance(exponent, (int, float)) else None
    elif same is not None and name == "var":
        degree = 2 * same
    elif same is not None and name == "var_mean":
        return [2 * same, same]
    elif name in ("clamp_min", "clamp"):
        low, high = [*op.args[1:3], None, None][:2]
        degree = same if high is None and isinstance(low, (int, float)) and 0 <= low <= _TINY else None
    elif name in _HOMOGENEOUS:
        degree = same
    return None if degree is None else [degree] * len(op.outputs)


def _degree_of_sum(op: Op, degrees: dict[Value, float], same: float | None) -> float | None:
    for term in op.args[:2]:
        if isinstance(term, Value):
            # What joins a signal may be another signal, which the norm behind undoes too; a constant keeps its size.
            if term not in degrees and not (term.from_input and same == 1):
                return None
        elif abs(term) > _TINY:
            return None
    return same


def _degree_of_product(op: Op, bias: int | None, degrees: dict[Value, float], through_layers: bool) -> float | None:
    if bias is not None and op.args[bias] is not None:
        return None
    if not through_layers and not all(value.from_input for value in op.inputs):
        return None
    return sum(degrees.get(value, 0.0) for value in tree_leaves(op.args) if isinstance(value, Value))


# --- where can the scale of each channel go? -------------------------------------------------------------------------


def channel_dim(layer: nn.Module, out: Value) -> int | None:
    """Dimension of the layer's output that holds its channels; None if it has another shape than the layer gives."""
    # Not by the weight: in train mode, each look at one that is made by spectral norm changes it.
    if isinstance(layer, nn.Linear):
        channels, dim = layer.out_features, -1
    else:
        channels, dim = layer.out_channels, len(out.shape) - len(layer.kernel_size) - 1
    if dim not in (-1, 0, 1) or not len(out.shape) or out.shape[dim] != channels:
        return None
    return dim


def norms_that_fold(trace: Trace, layer: nn.Module) -> list[_BatchNorm]:
    """The batch norms that fold into ``layer``, nearest first: each reads its outputs at once, and nothing else does.

    Reshaping and transposing in between is no obstacle. Of a layer that is called several times, all calls agree.
    """
    chains = [_chain(trace, layer, call.output) for call in trace.calls.get(layer, ())]
    return chains[0] if chains and all(chain == chains[0] for chain in chains) else []


def _chain(trace: Trace, layer: nn.Module, value: Value | None) -> list[_BatchNorm]:
    norms: list[_BatchNorm] = []
    dim = None if value is None else channel_dim(layer, value)
    if value is None or dim is None:
        return norms
    channels = torch.arange(1, 1 + value.shape[dim], device="cpu")  # also within `with torch.device(...)`
    labels = _along(channels, dim, value)
    while value not in trace.outputs:
        readers = [op for op in value.readers if op.reads_values]
        if len(readers) != 1 or len(readers[0].outputs) == 0:
            break
        op = readers[0]
        norm = trace.norm_of(op)
        if norm is not None and op.args[0] is value:
            if not torch.equal(_per_channel(labels, op.args[0]), channels):
                break
            norms.append(norm)
            value, labels = op.outputs[0], _along(channels, 1, op.outputs[0])
            continue
        moved = _moved(op, {value: labels}) if op.name in _MOVES or op.is_alias else None
        if moved is None or len(moved) != 1:
            break
        value, labels = op.outputs[0], moved[0]
    return norms


class Scales:
    """Where a positive factor for each output channel of each layer can go: into which channels of which batch norms.

    Args:
        trace: A recorded pass.
        layers: The layers whose outputs are to be scaled.

    Attributes:
        readers: For each layer the batch norms that read its channels, each with its own channels and the layer's
            that they are: ``(norm, (k,) positions, (k,) channels)``.
        leaks: The layers whose factor reaches something else, with the reason in words.
    """

    def __init__(self, trace: Trace, layers):
        self.readers: dict[nn.Module, list[tuple[_BatchNorm, Tensor, Tensor]]] = {}
        self.leaks: dict[nn.Module, str] = {}
        self._trace = trace
        self._starts: dict[nn.Module, int] = {}
        self._labels: dict[Value, Tensor] = {}  # broadcastable to the value; 0 where there is no factor
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

    def _begin(self, layer: nn.Module, out: Value | None) -> None:
        dim = None if out is None else channel_dim(layer, out)
        if out is None or dim is None:
            self.leaks.setdefault(layer, f"its output has shape {None if out is None else tuple(out.shape)}")
            return
        first = self._starts[layer]
        self._labels[out] = _along(torch.arange(first, first + out.shape[dim], device="cpu"), dim, out)

    def _pass_on(self, op: Op) -> None:
        labels = {value: self._labels[value] for value in op.inputs if value in self._labels}
        norm = self._trace.norm_of(op)
        if norm is not None and op.args[0] in labels:
            self._absorb(norm, op.args[0], labels[op.args[0]])
            return
        moved = _moved(op, labels)
        if moved is None:
            for label in labels.values():
                self._leak(label, f"its output goes into {op.name!r}")
            return
        self._labels.update((out, label) for out, label in zip(op.outputs, moved, strict=False) if label.any())

    def _absorb(self, norm: _BatchNorm, value: Value, labels: Tensor) -> None:
        if norm.running_mean is None:
            self._leak(labels, "its batch norm keeps no running statistics")
        channels = _per_channel(labels, value)
        if channels is None:
            self._leak(labels, "its batch norm mixes several of its channels")
        elif not any(torch.equal(channels, other) for other in self._read.setdefault(norm, [])):
            self._read[norm].append(channels)

    def _leak(self, labels: Tensor, why: str) -> None:
        for layer in self._layers_in(labels):
            self.leaks.setdefault(layer, why)

    def _layers_in(self, labels: Tensor) -> list[nn.Module]:
        return [layer for layer in self._starts if self._of_layer(layer, labels).any()]

    def _of_layer(self, layer: nn.Module, labels: Tensor) -> Tensor:
        first = self._starts[layer]
        return (labels >= first) & (labels < first + layer.weight.shape[0])

    def _match(self) -> None:
        for norm, inputs in self._read.items():
            for labels in inputs:
                if len(inputs) > 1:
                    self._leak(labels, "its batch norm serves several places")
                for layer in self._layers_in(labels):
                    positions = self._of_layer(layer, labels).nonzero().flatten()
                    channels = labels[positions] - self._starts[layer]
                    self.readers.setdefault(layer, []).append((norm, positions, channels))


def _along(values: Tensor, dim: int, value: Value) -> Tensor:
    shape = [1] * len(value.shape)
    shape[dim] = len(values)
    return values.view(shape)


def _per_channel(labels: Tensor, value: Value) -> Tensor | None:
    """``(C,)`` labels of the channels (dimension 1), or None if they differ within a channel."""
    if labels.ndim < 2 or labels.numel() != labels.shape[1]:
        return None
    return labels.flatten().expand(value.shape[1])


def _moved(op: Op, labels: dict[Value, Tensor]) -> list[Tensor] | None:
    """Labels of each output of ``op``, or None if it does not pass a factor for each label on."""
    name = op.name.rstrip("_") if op.name.endswith("_") else op.name
    if name in _MOVES:
        return _replayed(op, name, labels)
    tracked = [value for value in op.inputs if value in labels]
    label, shape = labels[tracked[0]], op.outputs[0].shape
    if name in ("add", "sub", "mul", "div"):
        return _combined(op, name, labels)
    if len(tracked) > 1:
        return None
    if name in _ELEMENTWISE:
        return [label] if tracked[0].shape == shape else None
    if name in _POOLS:
        spatial = int(name.split("d_")[0].rstrip("d")[-1] if "d_" in name else name.rstrip("d")[-1])
        return [label] if all(size == 1 for size in label.shape[-spatial:]) else None
    if name in _REDUCTIONS:
        dims = [*op.args[1:2], list(range(label.ndim))][0]
        dims = [dims] if isinstance(dims, int) else list(dims or range(label.ndim))
        keep = bool(op.args[2]) if len(op.args) > 2 else bool(op.kwargs.get("keepdim", False))
        return [label.amax(dims, keepdim=keep)] if all(label.shape[d] == 1 for d in dims) else None
    return None


def _replayed(op: Op, name: str, labels: dict[Value, Tensor]) -> list[Tensor] | None:
    if name == "constant_pad_nd" and len(op.args) > 2 and op.args[2]:
        return None
    zero = torch.zeros((), dtype=torch.long, device="cpu")
    args, kwargs = tree_map(
        lambda x: labels.get(x, zero).expand(x.shape) if isinstance(x, Value) else x, (op.args, op.kwargs)
    )
    if name in ("view", "_unsafe_view", "_reshape_alias"):  # labels are not laid out as the tensor is
        return [_compress(args[0].reshape(op.outputs[0].shape))]
    return [_compress(label) for label in tree_leaves(op.func(*args, **kwargs))]


def _compress(labels: Tensor) -> Tensor:
    """Dimensions along which all labels are equal shrink to one element."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        first = labels.narrow(dim, 0, min(size, 1))
        if size > 1 and (stride == 0 or torch.equal(labels, first.expand_as(labels))):
            labels = first
    return labels


def _combined(op: Op, name: str, labels: dict[Value, Tensor]) -> list[Tensor] | None:
    ndim = len(op.outputs[0].shape)
    first, second = (
        labels[x].reshape([1] * (ndim - labels[x].ndim) + list(labels[x].shape)) if x in labels else None
        for x in (y if isinstance(y, Value) else None for y in op.args[:2])
    )
    if name in ("add", "sub"):
        return [first] if first is not None and second is not None and torch.equal(first, second) else None
    if first is not None and second is not None or (name == "div" and first is None):
        return None
    return [first if first is not None else second]
