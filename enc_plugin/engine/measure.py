"""What measurements within a training run share: they see one model on all ranks, and leave it as they found it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.dist import broadcast, get_dist_info
from torch import nn

# Flags of activation checkpointing (mmpretrain's and timm's): where it is reentrant, autograd.grad refuses it.
_CHECKPOINTING = ("with_cp", "grad_checkpointing")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Block in which ``model`` is in eval mode and equal on all ranks, and which the run around it does not notice.

    Restored are the mode of every module, the random state of Python, NumPy and torch, and the buffers. Within the
    block all ranks have rank 0's buffers: batch norm statistics differ between ranks, and rank 0's are those that a
    checkpoint holds. Activation checkpointing and gradients are off. Every rank has to enter the block.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [
        (module, flag, getattr(module, flag))
        for module in model.modules()
        for flag in _CHECKPOINTING
        if isinstance(getattr(module, flag, None), bool)
    ]
    own = [(buffer, buffer.clone()) for buffer in model.buffers()]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            for module, flag, _ in flags:
                setattr(module, flag, False)
            if get_dist_info()[1] > 1:
                for buffer, _ in own:
                    broadcast(buffer, src=0)
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for module, flag, value in flags:
            setattr(module, flag, value)
        with torch.no_grad():
            for buffer, value in own:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
