"""The trace of a recorded forward pass: which operations ran, what they read, and in which modules.

A trace shows what a network really does; names, registration order and source code only suggest it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from ..layers import ENCLayer, StockLayer
from .example import Arguments

# Operations that read the shape, dtype or device of a tensor, but not its values.
_METADATA = ("_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "is_same_size")
_COPIES = ("clone", "_to_copy", "_unsafe_view", "_reshape_alias", "lift_fresh")


@dataclass(eq=False)
class Value:
    """A tensor at one point of the pass. An in-place operation creates a new value of the same tensor."""

    shape: torch.Size
    from_input: bool = False  # whether it depends on the network's input
    readers: list[Op] = field(default_factory=list)


@dataclass(eq=False)
class Op:
    """One ATen operation, with a :class:`Value` for each tensor."""

    index: int
    name: str  # such as 'convolution'
    func: Any  # None if the tensor changed without an observed operation
    args: tuple
    kwargs: dict
    inside: tuple[nn.Module, ...]  # the modules whose forward was running, the outermost first
    inputs: list[Value]
    outputs: list[Value]

    @property
    def kind(self) -> str:
        """The name, without the trailing underscore of in-place operations."""
        return self.name.rstrip("_")

    @property
    def is_alias(self) -> bool:
        """Whether the outputs have the same values as the input: views, detach, copies, casts."""
        if self.func is None or self.name in _COPIES:
            return True
        returns = self.func._schema.returns
        return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)

    @property
    def written(self) -> list[Value]:
        """For an in-place operation: the values, before it, of the tensors that it writes to."""
        in_place = self.func is not None and self.name.endswith("_")
        return [value for value in tree_leaves(self.args[:1]) if isinstance(value, Value)] if in_place else []

    @property
    def reads_values(self) -> bool:
        """False for operations such as ``zeros_like``, which read only shape and dtype."""
        return not self.name.endswith(_METADATA)


@dataclass(eq=False)
class Call:
    """One call of a module: its first input tensor and its first output tensor."""

    input: Value | None
    output: Value | None


@dataclass(eq=False)
class Trace:
    """A recorded forward pass.

    Attributes:
        model: The network.
        ops: All operations, in the order in which they ran.
        calls: The calls of each module that was called.
        outputs: The network's outputs.
        example: Positional and keyword arguments of the network; meta tensors if they were generated.
    """

    model: nn.Module
    ops: list[Op]
    calls: dict[nn.Module, list[Call]]
    outputs: list[Value]
    example: Arguments
    _states: dict[int, Value]  # parameters and buffers, by id of the tensor
    _assigned: dict[Value, int]  # values that were assigned to the attribute ``data`` of such a tensor, with its id

    def readers(self, layer: nn.Module) -> list[nn.Module]:
        """The modules that compute with the weight of ``layer`` while ``layer`` itself is not running.

        Computing with a view, copy or cast of the weight counts; reading its shape, dtype or device does not. Neither
        does the forward of another convolution or linear layer that shares the parameter, nor an average of the network
        that follows its weights in the pass (a momentum encoder), if its layer is ENC exactly if ``layer`` is.
        """
        weight = layer._parameters.get("weight")
        if weight is None or id(weight) not in self._states:
            return []
        found, open_values = [], [self._states[id(weight)]]
        averages = _Averages(self, layer, weight)
        while open_values:
            for op in open_values.pop().readers:
                if op.is_alias:
                    open_values.extend(op.outputs)
                elif (
                    op.reads_values
                    and not any(
                        module is layer
                        or (isinstance(module, StockLayer) and module._parameters.get("weight") is weight)
                        for module in op.inside
                    )
                    and not averages.updated_by(op)
                ):
                    found.append(op.inside[-1] if op.inside else self.model)
        return list(dict.fromkeys(found))

    def norm_of(self, op: Op) -> _BatchNorm | None:
        """The batch norm that ``op`` computes, whether the module was called or only its tensors were used, or None."""
        if "batch_norm" not in op.name:
            return None
        return next((m for m in reversed(op.inside) if isinstance(m, _BatchNorm)), None) or self._norms_by_state(op)

    def _norms_by_state(self, op: Op) -> _BatchNorm | None:
        norms = (m for m in self.model.modules() if isinstance(m, _BatchNorm))
        states = {value: key for key, value in self._states.items()}
        read = {states.get(value) for value in op.inputs} - {None}
        return next((m for m in norms if read & {id(t) for t in (m.running_mean, m.weight) if t is not None}), None)


class _Averages:
    """Finds operations with the weight of a layer that only update the weights of others, as in a momentum encoder.

    Args:
        trace: The pass.
        layer: A convolution or linear layer. The others have to be ENC if it is, and plain if it is plain.
        weight: Its weight.
    """

    def __init__(self, trace: Trace, layer: nn.Module, weight: Tensor):
        self.trace, self.shape = trace, weight.shape
        alike = (m for m in trace.model.modules() if isinstance(m, StockLayer))
        self.weights = {
            id(m._parameters.get("weight")) for m in alike if isinstance(m, ENCLayer) == isinstance(layer, ENCLayer)
        }

    @cached_property
    def _states(self) -> dict[Value, int]:
        """The parameter or buffer (by id) of each value that is a view of one, or was written to one in place."""
        found = {value: key for key, value in self.trace._states.items()}
        for op in self.trace.ops:
            sources = op.inputs[:1] * len(op.outputs) if op.is_alias else op.written
            found |= {out: found[source] for out, source in zip(op.outputs, sources, strict=False) if source in found}
        return found

    def updated_by(self, op: Op) -> bool:
        """Whether everything that ``op`` computes from the layer's weight becomes the weight of other layers."""
        if any(value.from_input for value in op.outputs):
            return False
        if any(value in self._states for value in op.written):
            same = [self._states.get(value) for value in op.written if value.shape == self.shape]
            return bool(same) and self.weights.issuperset(same)
        return bool(op.outputs) and all(map(self._becomes_weight, op.outputs))

    def _becomes_weight(self, value: Value) -> bool:
        if value in self.trace._assigned:
            return self.trace._assigned[value] in self.weights
        return bool(value.readers) and value not in self.trace.outputs and all(map(self.updated_by, value.readers))
