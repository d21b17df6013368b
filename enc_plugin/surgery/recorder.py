"""Recording of the operations of a forward pass.

Activations can be meta tensors, which have a shape but no values, so recording a large network is cheap.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .example import Arguments
from .trace import Call, Op, Trace, Value


class Recorder(TorchDispatchMode):
    """Records each operation. With ``shapes_only``, operations that depend on the input run on meta tensors."""

    def __init__(self, model: nn.Module, shapes_only: bool):
        super().__init__()
        self.model, self.shapes_only = model, shapes_only
        self.ops: list[Op] = []
        self.calls: dict[nn.Module, list[Call]] = {}
        self._inside: tuple[nn.Module, ...] = ()
        # Id of a tensor -> its value, and the last in-place write to its storage when the value was recorded.
        self._bound: dict[int, tuple[Value, Value | None]] = {}
        self._storages: dict[int, Value] = {}  # storage -> its first value
        self._writes: dict[int, Value] = {}  # storage -> the last value written into it in place
        self._alive: list[Tensor] = []  # keeps tensors alive, so that their ids are not reused
        self._meta_copies: dict[int, Tensor] = {}  # id of a real tensor -> the meta tensor that replaces it
        self._shadowed: set[int] = set()  # ids of real tensors whose meta copy was written to in place
        self._backups: list[tuple[Tensor, Tensor]] = []
        states = [*model.parameters(), *model.buffers()]
        self._states = {id(tensor): self._of(tensor) for tensor in states}
        self._data = [(tensor, tensor.data) for tensor in states]
        self._assigned: dict[Value, int] = {}
        attributes = (v for module in model.modules() for v in module.__dict__.values() if isinstance(v, Tensor))
        self._lasting = {_storage(tensor) for tensor in (*states, *attributes)}

    def take_input(self, tensor: Any) -> Any:
        """Register an input, and return the tensor to pass to the network instead."""
        if not isinstance(tensor, Tensor):
            return tensor
        self._lasting.add(_storage(tensor))
        tensor = self._meta_copy(tensor) if self.shapes_only else tensor
        self._bind(tensor, Value(tensor.shape, from_input=True))
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record within the context. On exit, restore tensors that the network changed in place."""
        for module in self.model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            # Forward hooks are not used: they do not see direct calls of forward(), and some of torch's modules take
            # another code path if they have hooks.
            module.__dict__["forward"] = partial(self._call, module, module.forward)
            module.__dict__["_compiled_call_impl"] = None
        if not self.shapes_only:  # the schema of batch norm does not say that it writes to running statistics
            self._backups += [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with ExitStack() as stack, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if any(hasattr(module, "_orig_mod") for module in self.model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                with self:
                    yield
            finally:
                for tensor, values in reversed(self._backups):
                    tensor.data.copy_(values)
                self._take_back_assigned()

    def _take_back_assigned(self) -> None:
        """Restore parameters and buffers whose attribute ``data`` was set."""
        for tensor, data in self._data:
            storage = _storage(tensor)
            if storage != _storage(data):
                if storage in self._storages:
                    self._assigned[self._writes.get(storage, self._storages[storage])] = id(tensor)
                tensor.data = data

    def finish(self, outputs: Any, example: Arguments) -> Trace:
        """The trace of a pass on ``example`` that returned ``outputs``."""
        values = [self._of(tensor) for tensor in tensors_in(outputs)]
        return Trace(self.model, self.ops, self.calls, values, example, self._states, self._assigned)

    def _call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outside, self._inside = self._inside, (*self._inside, module)
        given = self._first((args, kwargs))
        try:
            out = forward(*args, **kwargs)
        finally:
            self._inside = outside
        self.calls.setdefault(module, []).append(Call(given, self._first(out)))
        return out

    def _first(self, arguments_or_outputs: Any) -> Value | None:
        tensors = tensors_in(arguments_or_outputs)
        return self._of(tensors[0]) if tensors else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = [self._of(tensor) for tensor in tensors]
        written = _written(func, args, kwargs)
        recorded_args, recorded_kwargs = tree_map(lambda x: self._of(x) if isinstance(x, Tensor) else x, (args, kwargs))
        if self.shapes_only and any(t.is_meta or id(t) in self._shadowed for t in tensors):
            self._shadowed.update(id(t) for t in written if not t.is_meta)
            out = self._run_on_meta(func, args, kwargs, tensors)
        else:
            for tensor in written:
                if _storage(tensor) in self._lasting and not tensor.is_meta:
                    self._backups.append((tensor, tensor.clone()))
            out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        made += [tensor for tensor in written if all(tensor is not other for other in made)]
        if tensors:
            op = self._note(func.overloadpacket.__name__, func, recorded_args, recorded_kwargs, inputs, made)
            for tensor, value in zip(made, op.outputs, strict=True):
                if any(tensor is other for other in written):
                    self._writes[_storage(tensor)] = value
                self._bind(tensor, value)
        return out

    def _run_on_meta(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        if func.overloadpacket.__name__ == "native_batch_norm":  # torch's meta implementation is 100 times slower
            x = self._meta_copy(args[0])
            return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
        originals = {id(self._meta_copy(t)): t for t in tensors}
        args, kwargs = tree_map(lambda x: self._meta_copy(x) if isinstance(x, Tensor) else x, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return tree_map(lambda x: originals.get(id(x), x), func(*args, **kwargs))

    def _meta_copy(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._meta_copies:
            self._alive.append(tensor)
            copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._meta_copies[id(tensor)] = copy
        return self._meta_copies[id(tensor)]

    def _note(self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Value], made: list[Tensor]) -> Op:
        from_input = any(value.from_input for value in inputs)
        outputs = [Value(tensor.shape, from_input) for tensor in made]
        op = Op(len(self.ops), name, func, args, kwargs, self._inside, list(dict.fromkeys(inputs)), outputs)
        self.ops.append(op)
        for value in op.inputs:
            value.readers.append(op)
        return op

    def _bind(self, tensor: Tensor, value: Value) -> None:
        self._alive.append(tensor)
        storage = _storage(tensor)
        self._storages.setdefault(storage, value)
        self._bound[id(tensor)] = value, self._writes.get(storage)

    def _of(self, tensor: Tensor) -> Value:
        """The current value of ``tensor``."""
        storage = _storage(tensor)
        write = self._writes.get(storage)
        value, seen = self._bound.get(id(tensor), (None, None))
        if value is None and storage not in self._storages:  # a constant, or not created by a recorded operation
            value = Value(tensor.shape)
        elif value is None:  # such as tensor.data, which is not an operation
            source = write or self._storages[storage]
            value = self._note("alias", None, (source,), {}, [source], [tensor]).outputs[0]
        elif write is not None and write is not seen:  # a view of the tensor was written to in place
            value = self._note("written_through_a_view", None, (value, write), {}, [value, write], [tensor]).outputs[0]
        else:
            return value
        self._bind(tensor, value)
        return value


def _storage(tensor: Tensor) -> int:
    with suppress(NotImplementedError, RuntimeError):  # sparse tensors have none
        return int(tensor.untyped_storage()._cdata)
    return -id(tensor)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that ``func`` writes to in place."""
    if not func._schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return [tensor for tensor in tree_leaves(found) if isinstance(tensor, Tensor)]


def tensors_in(outputs: Any) -> list[Tensor]:
    """The tensors in arguments or outputs of a module: in containers, and in attributes of objects."""
    leaves = [y for x in tree_leaves(outputs) for y in ([x] if isinstance(x, Tensor) else tree_leaves(_attributes(x)))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _attributes(x: Any) -> list:
    return [] if isinstance(x, (nn.Module, type)) else list(getattr(x, "__dict__", {}).values())
