"""Which forward pass is recorded: on the example, or on an input that is made up, by shapes alone where that works.

The pass leaves no trace: modes, buffers, attributes, hooks and random states are those from before. A network whose
control flow depends on values is run for real instead of on shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from .example import Arguments, as_arguments, made_up
from .recorder import Recorder
from .restored import plain_forward, restored, without_wrappers
from .trace import Trace


class RecordError(ValueError):
    """The network does not run on the example, or on any that was made up for it."""


def record_forward(model: nn.Module, example: Any = None, training: bool = False) -> Trace:
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
    model = without_wrappers(model)
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


def _record(model: nn.Module, arguments: Arguments, training: bool, shapes_only: bool) -> Trace:
    recorder = Recorder(model, shapes_only)
    args, kwargs = tree_map(recorder.take_input, arguments)
    with ExitStack() as stack:
        stack.enter_context(restored(model, training))
        stack.enter_context(plain_forward(list(model.modules())))
        stack.enter_context(recorder.watching())
        outputs = model(*args, **kwargs)
    return recorder.finish(outputs, arguments)
