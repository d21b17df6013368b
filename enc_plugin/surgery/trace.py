"""What a recorded forward pass tells: which operations ran, what each of them read, and inside of which modules.

Names, registration order and source text tell what a network may do; the recorded pass tells what it does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import StockLayer
from .example import Arguments

# Operations that read shape, dtype or device of a tensor and none of its values.
_METADATA = ("_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "is_same_size")
_COPIES = ("clone", "_to_copy", "_unsafe_view", "_reshape_alias", "lift_fresh")


@dataclass(eq=False)
class Value:
    """A tensor at one point of the pass; an in-place operation makes a new value of the same tensor."""

    shape: torch.Size
    from_input: bool = False  # whether it depends on the network's input
    readers: list[Op] = field(default_factory=list)


@dataclass(eq=False)
class Op:
    """One ATen operation, with :class:`Value` in the place of each tensor."""

    index: int
    name: str  # such as 'convolution'
    func: Any  # None: no operation was seen, but the tensor is another one
    args: tuple
    kwargs: dict
    inside: tuple[nn.Module, ...]  # the modules that were being called, the outermost first
    inputs: list[Value]
    outputs: list[Value]

    @property
    def kind(self) -> str:
        """The name, without the underscore of operations that work in place."""
        return self.name.rstrip("_")

    @property
    def is_alias(self) -> bool:
        """Whether the outputs hold the very values of the input: views, detach, copies, casts."""
        if self.func is None or self.name in _COPIES:
            return True
        returns = self.func._schema.returns
        return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)

    @property
    def reads_values(self) -> bool:
        """False for operations such as ``zeros_like``, which read shape and dtype alone."""
        return not self.name.endswith(_METADATA)


@dataclass(eq=False)
class Call:
    """One call of a module: its first input and output, as far as they are tensors."""

    input: Value | None
    output: Value | None


@dataclass(eq=False)
class Trace:
    """What a forward pass did.

    Attributes:
        model: The network.
        ops: All operations, in the order in which they ran.
        calls: The calls of each module that was called.
        outputs: The network's outputs.
        example: Positional and keyword arguments that the network was called with; meta tensors if they were made up.
    """

    model: nn.Module
    ops: list[Op]
    calls: dict[nn.Module, list[Call]]
    outputs: list[Value]
    example: Arguments
    _states: dict[int, Value]  # parameters and buffers, by id of the tensor

    def readers(self, layer: nn.Module) -> list[nn.Module]:
        """The modules that compute with the weight of ``layer`` outside of its own call.

        Views, copies and casts count when something computes with them; asking for shape, dtype or device does not.
        Other convolutions and linear layers that share the parameter do not count while they are called themselves.
        """
        weight = layer._parameters.get("weight")
        if weight is None or id(weight) not in self._states:
            return []
        found, open_values = [], [self._states[id(weight)]]
        while open_values:
            for op in open_values.pop().readers:
                if op.is_alias:
                    open_values.extend(op.outputs)
                elif op.reads_values and not any(
                    module is layer or (isinstance(module, StockLayer) and module._parameters.get("weight") is weight)
                    for module in op.inside
                ):
                    found.append(op.inside[-1] if op.inside else self.model)
        return list(dict.fromkeys(found))

    def norm_of(self, op: Op) -> _BatchNorm | None:
        """The batch norm that ``op`` is the work of, whether its module was called or its tensors were used."""
        if "batch_norm" not in op.name:
            return None
        return next((m for m in reversed(op.inside) if isinstance(m, _BatchNorm)), None) or self._norms_by_state(op)

    def _norms_by_state(self, op: Op) -> _BatchNorm | None:
        norms = (m for m in self.model.modules() if isinstance(m, _BatchNorm))
        states = {value: key for key, value in self._states.items()}
        read = {states.get(value) for value in op.inputs} - {None}
        return next((m for m in norms if read & {id(t) for t in (m.running_mean, m.weight) if t is not None}), None)
