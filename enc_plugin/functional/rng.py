"""Saving and restoring the random states of Python, NumPy and torch."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def kept_random_states(devices: Iterable[torch.device] = (), model: nn.Module | None = None) -> Iterator[None]:
    """On exit, restore the global random generators of Python, NumPy and torch to their state on entry.

    Args:
        devices: Accelerators whose generators are restored too. The CPU's generator always is.
        model: Network whose ``torch.Generator`` objects (attributes of its modules) are restored too.
    """
    modules = [] if model is None else model.modules()
    own = [value for module in modules for value in vars(module).values() if isinstance(value, torch.Generator)]
    own_states = [generator.get_state() for generator in own]
    numpy = sys.modules.get("numpy")  # torch works without it
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for device in {device for device in devices if device.type != "cpu"}:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        try:
            yield
        finally:
            for generator, state in zip(own, own_states, strict=True):
                generator.set_state(state)
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
