"""One recorded forward pass: which operations ran, what each of them read, and inside of which modules.

Names, registration order and source text tell what a network may do; the recorded pass tells what it does. The pass
runs in eval mode and leaves no trace: modes, buffers, attributes, hooks and random states are those from before.
Activations have shapes but no values (meta tensors), so that even large networks cost little; a network whose control
flow depends on values is run for real instead.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..layers import ENC_LAYERS, ENCLayer
from .example import Arguments, as_arguments, made_up

LAYERS = tuple(ENC_LAYERS)

# Operations that read shape, dtype or device of a tensor and none of its values.
_METADATA = ("_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "is_same_size")
_COPIES = ("clone", "_to_copy", "_unsafe_view", "_reshape_alias", "lift_fresh")


class RecordError(ValueError):
    """The network does not run on the example, or on any that was made up for it."""


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
    func: Any
    args: tuple
    kwargs: dict
    inside: tuple[nn.Module, ...]  # the modules that were being called, the outermost first
    inputs: list[Value]
    outputs: list[Value]

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
                    module is layer or (isinstance(module, LAYERS) and module._parameters.get("weight") is weight)
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


def record(model: nn.Module, example: Any = None, training: bool = False) -> Trace:
    """Run ``model`` once and write down what it does; ENC layers compute with their free weight meanwhile.

    Args:
        model: Any network, on any device, meta included. Wrappers (``DistributedDataParallel``, ``torch.compile``)
            are looked through.
        example: A batch that it takes: a tensor, a tuple of positional arguments or a dict of keyword arguments. None:
            some are made up from the shapes of its layers and tried in turn.
        training: Record the pass in train mode.

    Raises:
        RecordError: If the network does not run.
    """
    model = unwrap(model)
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise RecordError(f"{type(model).__name__} has lazy layers, which have no weights; run it on a batch first")
    first, needs_values = None, False
    for arguments, shapes_only in _candidates(model, example):
        if shapes_only and needs_values:  # other sizes would not help
            continue
        try:
            return _record(model, arguments, training, shapes_only)
        except Exception as error:
            first = first or (arguments, error)
            needs_values |= isinstance(error, NotImplementedError) or "meta" in str(error)
    if first is None:
        raise RecordError(
            f"an input cannot be made up for {type(model).__name__}, which has no layer that tells its shape; "
            "pass a batch that it takes"
        )
    shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(first[0]) if isinstance(t, Tensor))
    raise RecordError(
        f"{type(model).__name__} does not run on {'a made-up input' if example is None else 'the example'} of shape "
        f"{shapes} ({first[1]}); pass a batch that it takes"
    ) from first[1]


def _candidates(model: nn.Module, example: Any) -> Iterator[tuple[Arguments, bool]]:
    """Arguments to try, and whether on shapes alone: first so, since it is cheap, then for real."""
    # This layer chooses between two implementations by the device of its input, and so needs one that has values.
    if not any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        yield from ((x, True) for x in (made_up(model) if example is None else [as_arguments(example)]))
    if not any(parameter.is_meta for parameter in model.parameters()):
        given = made_up(model, for_values=True) if example is None else [as_arguments(example)]
        yield from ((x, False) for x in given)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside of ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


@contextmanager
def untouched(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Put ``model`` into eval (or train) mode, and give it back as it was: attributes, hooks and random states.

    Forward hooks that are not the network's own stay silent meanwhile. Buffers are not copied.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    saved = []
    for module in modules:
        contents = [(v, v.copy()) for v in module.__dict__.values() if isinstance(v, (dict, list, set, deque))]
        saved.append((module, dict(module.__dict__), contents))
    own = {id(x) for module in modules for x in (module, *module.__dict__.values())}
    with _random_states(model):
        try:
            for module in modules:
                # Not by eval(): some networks merge weights or empty caches there.
                module.__dict__["training"] = training
                for key in ("_forward_hooks", "_forward_pre_hooks"):
                    hooks = module.__dict__.get(key, {})
                    module.__dict__[key] = OrderedDict((k, h) for k, h in hooks.items() if _belongs(h, own))
            yield
        finally:
            for module, attributes, contents in saved:
                module.__dict__.clear()
                module.__dict__.update(attributes)
                for container, content in contents:
                    container.clear()
                    (container.update if isinstance(container, (dict, set)) else container.extend)(content)


def _belongs(hook: Any, own: set[int]) -> bool:
    """Whether a hook is a part of the network: its module's, one of its parts', or torch's (weight_norm, prune)."""
    while isinstance(hook, partial):
        hook = hook.func
    owner = getattr(hook, "__self__", hook)
    return id(owner) in own or type(owner).__module__.startswith("torch.nn.utils")


@contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = {t.device.index for t in model.parameters() if t.is_cuda}
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextmanager
def plain_forward(layers) -> Iterator[None]:
    """Let the ENC layers among ``layers`` compute with W while the context lasts: the network they came from."""
    # Of a parametrized layer, the weight is an attribute of the class that it has.
    enc = {x: type(x) for x in layers if isinstance(x, ENCLayer) and not parametrize.is_parametrized(x)}
    for layer in enc:
        layer.__class__ = layer.plain_class
    try:
        yield
    finally:
        for layer, own in enc.items():
            layer.__class__ = own


def _record(model: nn.Module, arguments: Arguments, training: bool, shapes_only: bool) -> Trace:
    recorder = _Recorder(model, shapes_only)
    args, kwargs = tree_map(recorder.take_input, arguments)
    with ExitStack() as stack:
        stack.enter_context(untouched(model, training))
        stack.enter_context(plain_forward(list(model.modules())))
        stack.enter_context(recorder.watching())
        outputs = model(*args, **kwargs)
    return recorder.finish(outputs, arguments)


class _Recorder(TorchDispatchMode):
    """Writes down each operation; with ``shapes_only`` those that follow from the input run on meta tensors."""

    def __init__(self, model: nn.Module, shapes_only: bool):
        super().__init__()
        self.model, self.shapes_only = model, shapes_only
        self.ops: list[Op] = []
        self.calls: dict[nn.Module, list[Call]] = {}
        self._inside: tuple[nn.Module, ...] = ()
        self._bound: dict[int, tuple[Value, Value | None]] = {}  # by id of the tensor: value, last write it has seen
        self._storages: dict[int, Value] = {}  # the first value of each storage, and
        self._writes: dict[int, Value] = {}  # the last one that was written into it
        self._alive: list[Tensor] = []  # so that ids stay their tensors' own
        self._twins: dict[int, Tensor] = {}  # meta tensors in the place of real ones
        self._shadowed: set[int] = set()  # real tensors whose twin has been written to
        self._backups: list[tuple[Tensor, Tensor]] = []
        states = [*model.parameters(), *model.buffers()]
        self._states = {id(tensor): self._of(tensor) for tensor in states}
        attributes = (v for module in model.modules() for v in module.__dict__.values() if isinstance(v, Tensor))
        self._lasting = {_storage(tensor) for tensor in (*states, *attributes)}

    def take_input(self, tensor: Any) -> Any:
        """An input tensor as the network gets it."""
        if not isinstance(tensor, Tensor):
            return tensor
        self._lasting.add(_storage(tensor))
        tensor = self._twin(tensor) if self.shapes_only else tensor
        self._bind(tensor, Value(tensor.shape, from_input=True))
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record while the context lasts; tensors that the network writes to in place get their values back."""
        for module in self.model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            # Not by hooks: they miss calls of forward(), and some of torch's modules act otherwise with hooks on.
            module.__dict__["forward"] = partial(self._call, module, module.forward)
            module.__dict__["_compiled_call_impl"] = None
        if not self.shapes_only:  # batch norm's operations do not declare that they write to running statistics
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

    def finish(self, outputs: Any, example: Arguments) -> Trace:
        """The record of a pass on ``example`` that returned ``outputs``."""
        values = [self._of(tensor) for tensor in _tensors(outputs)]
        return Trace(self.model, self.ops, self.calls, values, example, self._states)

    def _call(self, module: nn.Module, forward, *args, **kwargs):
        outside, self._inside = self._inside, (*self._inside, module)
        given = next(iter(_tensors((args, kwargs))), None)
        given = None if given is None else self._of(given)
        try:
            out = forward(*args, **kwargs)
        finally:
            self._inside = outside
        made = next(iter(_tensors(out)), None)
        self.calls.setdefault(module, []).append(Call(given, None if made is None else self._of(made)))
        return out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = [self._of(tensor) for tensor in tensors]
        written = _written(func, args, kwargs)
        recorded_args, recorded_kwargs = tree_map(lambda x: self._of(x) if isinstance(x, Tensor) else x, (args, kwargs))
        if self.shapes_only and any(t.is_meta or id(t) in self._shadowed for t in tensors):
            self._shadowed.update(id(t) for t in written if not t.is_meta)
            out = self._run_on_twins(func, args, kwargs, tensors)
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

    def _run_on_twins(self, func, args, kwargs, tensors: list[Tensor]):
        if func.overloadpacket.__name__ == "native_batch_norm":  # its own meta version takes a hundred times as long
            x = self._twin(args[0])
            return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
        twins = {id(self._twin(t)): t for t in tensors}
        args, kwargs = tree_map(lambda x: self._twin(x) if isinstance(x, Tensor) else x, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return tree_map(lambda x: twins.get(id(x), x), func(*args, **kwargs))

    def _twin(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._twins:
            self._alive.append(tensor)
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._twins[id(tensor)] = twin
        return self._twins[id(tensor)]

    def _note(self, name, func, args, kwargs, inputs: list[Value], made: list[Tensor]) -> Op:
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
        """The value that ``tensor`` has now."""
        storage = _storage(tensor)
        write = self._writes.get(storage)
        value, seen = self._bound.get(id(tensor), (None, None))
        if value is None and storage not in self._storages:  # a constant, or made where no operation is seen
            value = Value(tensor.shape)
        elif value is None:  # tensor.data is no operation either
            source = write or self._storages[storage]
            value = self._note("alias", None, (source,), {}, [source], [tensor]).outputs[0]
        elif write is not None and write is not seen:  # a view of it has been written to
            value = self._note("written_through_a_view", None, (value, write), {}, [value, write], [tensor]).outputs[0]
        else:
            return value
        self._bind(tensor, value)
        return value


def _storage(tensor: Tensor) -> int:
    with suppress(NotImplementedError, RuntimeError):  # sparse tensors have none
        return tensor.untyped_storage()._cdata
    return -id(tensor)


def _written(func, args, kwargs) -> list[Tensor]:
    """The tensors that ``func`` writes to."""
    if not func._schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return [tensor for tensor in tree_leaves(found) if isinstance(tensor, Tensor)]


def _tensors(outputs: Any) -> list[Tensor]:
    """The tensors in what a module takes or returns: containers, and objects that hold tensors as attributes."""
    leaves = [y for x in tree_leaves(outputs) for y in ([x] if isinstance(x, Tensor) else tree_leaves(_attributes(x)))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _attributes(x: Any) -> list:
    return [] if isinstance(x, (nn.Module, type)) else list(getattr(x, "__dict__", {}).values())
