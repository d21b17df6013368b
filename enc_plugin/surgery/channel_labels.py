"""Labels that track the output channels of layers through the operations of a forward pass.

A label is an integer for each element of a value, stored in a tensor that is broadcastable to the value. It identifies
the output channel, of one of the layers, whose scale the element is proportional to.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..layers import StockLayer
from .operations import ELEMENTWISE, MOVES, POOLS, REDUCTIONS
from .trace import Op, Value


def channel_dim(layer: StockLayer, out: Value) -> int | None:
    """Dimension of the layer's output that holds its channels; None if ``out`` has an unexpected shape."""
    # The weight's shape is not used: in train mode, each access to a weight with spectral norm changes it.
    if isinstance(layer, nn.Linear):
        channels, dim = layer.out_features, -1
    else:
        channels, dim = layer.out_channels, len(out.shape) - len(layer.kernel_size) - 1
    if dim not in (-1, 0, 1) or not len(out.shape) or out.shape[dim] != channels:
        return None
    return dim


def along_dim(values: Tensor, dim: int, value: Value) -> Tensor:
    """Reshape ``values`` to labels along dimension ``dim`` of ``value``."""
    shape = [1] * len(value.shape)
    shape[dim] = len(values)
    return values.view(shape)


def per_channel(labels: Tensor, value: Value) -> Tensor | None:
    """Labels ``(C,)`` of the channels (dimension 1), or None if they differ within a channel."""
    if labels.ndim < 2 or labels.numel() != labels.shape[1]:
        return None
    return labels.flatten().expand(value.shape[1])


def labels_behind(op: Op, labels: dict[Value, Tensor]) -> list[Tensor] | None:
    """Labels of each output of ``op``, or None if ``op`` does not preserve a positive factor for each label."""
    name = op.kind
    if name in MOVES:
        return _replayed(op, name, labels)
    tracked = [value for value in op.inputs if value in labels]
    if not op.outputs:  # such as item()
        return None
    label, shape = labels[tracked[0]], op.outputs[0].shape
    if name in ("add", "sub", "mul", "div"):
        return _combined(op, name, labels)
    if len(tracked) > 1:
        return None
    if name in ELEMENTWISE:
        return [label] if tracked[0].shape == shape else None
    if name in POOLS:
        spatial = int(re.findall(r"(\d)d", name)[0])
        return [label] if all(size == 1 for size in label.shape[-spatial:]) else None
    if name in REDUCTIONS:
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
    if name in ("view", "_unsafe_view", "_reshape_alias"):  # labels have other strides, so that view() might fail
        return [_compress(args[0].reshape(op.outputs[0].shape))]
    return [_compress(label) for label in tree_leaves(op.func(*args, **kwargs))]


def _compress(labels: Tensor) -> Tensor:
    """Shrink each dimension along which all labels are equal to one element."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        first = labels.narrow(dim, 0, min(size, 1))
        if size > 1 and (stride == 0 or torch.equal(labels, first.expand_as(labels))):
            labels = first
    return labels


def _combined(op: Op, name: str, labels: dict[Value, Tensor]) -> list[Tensor] | None:
    ndim = len(op.outputs[0].shape)
    first, second = (labels.get(x) if isinstance(x, Value) else None for x in op.args[:2])
    first, second = (x if x is None else x.reshape((1,) * (ndim - x.ndim) + x.shape) for x in (first, second))
    if name in ("add", "sub"):
        return [first] if first is not None and second is not None and torch.equal(first, second) else None
    if first is not None and second is not None or (name == "div" and first is None):
        return None
    return [x for x in (first, second) if x is not None]
