"""Random states of Python, NumPy and torch, given back as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def kept_random_states(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Block after which the global generators of Python, NumPy and torch are in the state from before.

    Args:
        devices: Accelerators whose generators are kept, too. The CPU's always is.
    """
    numpy = sys.modules.get("numpy")  # torch works without it
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for device in {device for device in devices if device.type != "cpu"}:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
