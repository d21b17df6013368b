"""Saving and restoring the buffers of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """On exit, restore the values of all buffers, put back those that modules have replaced, and drop new ones."""
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    scripted = torch.jit.ScriptModule  # holds its buffers outside of Python
    registered = [(m._buffers, dict(m._buffers)) for m in model.modules() if not isinstance(m, scripted)]
    try:
        yield
    finally:
        for buffer, value in values:
            buffer.data.copy_(value)
        for buffers, content in registered:
            buffers.clear()
            buffers.update(content)
