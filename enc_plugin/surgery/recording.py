"""Recording a forward pass of a network, on an example or on a generated input.

The pass runs on meta tensors if possible. A network whose control flow depends on values runs on real tensors. Modes,
buffers, attributes, hooks and random states are restored afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from .example import Arguments, as_arguments, made_up
from .recorder import Recorder
from .restored import plain_forward, restored, without_wrappers
from .trace import Trace


class RecordError(ValueError):
    """The network does not run on the example, or on any generated input."""


def record_forward(model: nn.Module, example: Any = None, training: bool = False) -> Trace:
    """Run ``model`` once and record its operations. ENC layers compute with their free weight in this pass.

    Args:
        model: Any network, on any device including meta. Wrappers (``DistributedDataParallel``, ``torch.compile``) are
            removed for the pass.
        example: An input batch: a tensor, a tuple of positional arguments or a dict of keyword arguments. None: inputs
            are generated from the shapes of the layers and tried one after the other.
        training: Whether to run in train mode.

    Raises:
        RecordError: If the network does not run.
    """
    model = without_wrappers(model)
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise RecordError(f"{type(model).__name__} has lazy layers without weights; run it once on a batch")
    first, needs_values = None, False
    for arguments, shapes_only in _candidates(model, example):
        if shapes_only and needs_values:  # another size would fail too
            continue
        try:
            return _record(model, arguments, training, shapes_only)
        except Exception as error:
            first = first or (arguments, error)
            needs_values |= isinstance(error, NotImplementedError) or "meta" in str(error)
    if first is None:
        raise RecordError(
            f"no input can be generated for {type(model).__name__}, because no layer implies the input's shape; pass "
            "an input batch"
        )
    shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(first[0]) if isinstance(t, Tensor))
    raise RecordError(
        f"{type(model).__name__} does not run on {'a generated input' if example is None else 'the example'} of shape "
        f"{shapes} ({first[1]}); pass an input batch that fits"
    ) from first[1]


def _candidates(model: nn.Module, example: Any) -> Iterator[tuple[Arguments, bool]]:
    """Arguments to try, each with True to run on meta tensors (first, because it is cheap) or False for real ones."""
    # nn.TransformerEncoderLayer chooses its implementation by the device of its input, so it needs a real one.
    if not any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        yield from ((x, True) for x in (made_up(model) if example is None else [as_arguments(example)]))
    if not any(parameter.is_meta for parameter in model.parameters()):
        given = made_up(model, for_values=True) if example is None else [as_arguments(example)]
        yield from ((x, False) for x in given)


def _record(model: nn.Module, arguments: Arguments, training: bool, shapes_only: bool) -> Trace:
    recorder = Recorder(model, shapes_only)
    args, kwargs = tree_map(recorder.take_input, arguments)
    with restored(model, training), plain_forward(list(model.modules())), recorder.watching():
        outputs = model(*args, **kwargs)
    return recorder.finish(outputs, arguments)
