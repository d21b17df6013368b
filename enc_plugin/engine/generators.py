"""Random generators that datasets, transforms, samplers and models own, beside the global ones."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Generator = random.Random | np.random.Generator | np.random.RandomState | np.random.BitGenerator | torch.Generator

# Long lists are of samples.
_MAX_ITEMS = 1000
_NO_OWNERS = (Tensor, np.ndarray, str, bytes, int, float, complex, type, type(None), types.ModuleType)


def owned_generators(**roots: Any) -> dict[str, Generator]:
    """The generators that objects hold in attributes, lists and dicts at any depth, by the way to them.

    Args:
        **roots: Objects, by what to call them, such as ``dataset=...``.
    """
    found, seen, waiting = {}, set(), list(roots.items())
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen or isinstance(value, _NO_OWNERS):
            continue
        seen.add(id(value))
        if isinstance(value, Generator):
            if not isinstance(value, random.SystemRandom):  # the system's numbers have no state
                found[name] = value
        else:
            waiting.extend((f"{name}.{key}", item) for key, item in _parts(value))
    return found


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (list, tuple, Mapping)):
        if len(value) <= _MAX_ITEMS:
            yield from value.items() if isinstance(value, Mapping) else enumerate(value)
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield "self", value.__self__
    elif not isinstance(value, types.FunctionType):
        yield from getattr(value, "__dict__", {}).items()


def get_state(generator: Generator) -> Any:
    """The generator's state, in plain values and tensors."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return getattr(generator, "bit_generator", generator).state


def set_state(generator: Generator, state: Any) -> None:
    """Set what :func:`get_state` has returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state
