"""How a network runs in attacks and measurements: in eval mode, and without waiting for other processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def require_eval_mode(forward: Callable) -> Iterator[None]:
    """Raise ``ValueError`` if a module of ``forward`` runs in train mode within the block.

    In train mode each image's output depends on its batch (batch norm) or is random (dropout), and a forward pass
    changes running statistics. If ``forward`` is a module, all of it is checked on entry. If it is another callable,
    each module is checked when it is called.
    """
    model = module_of(forward)
    if model is not None:
        for name, module in model.named_modules():
            _check_mode(module, name)
        yield
        return
    handle = register_module_forward_pre_hook(lambda module, _: _check_mode(module))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def undistributed(forward: Callable) -> Iterator[None]:
    """Within the block, a ``DistributedDataParallel`` in ``forward`` just calls the network that it wraps.

    Its own forward pass copies buffers from the first process, and waits for processes that may not measure anything.
    """
    model = module_of(forward)
    modules = [] if model is None else model.modules()
    wrappers = [module for module in modules if isinstance(module, nn.parallel.DistributedDataParallel)]
    for wrapper in wrappers:
        wrapper.__dict__["forward"] = wrapper.module
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.__dict__["forward"]


def module_of(forward: Callable) -> nn.Module | None:
    """The module that ``forward`` is or is a method of, or None."""
    while isinstance(forward, functools.partial):
        forward = forward.func
    forward = getattr(forward, "__self__", forward)
    # The wrapper that torch.compile returns has its own `training` flag, which some versions of torch do not update.
    forward = getattr(forward, "_orig_mod", forward)
    return forward if isinstance(forward, nn.Module) else None


def _check_mode(module: nn.Module, name: str = "") -> None:
    if getattr(module, "training", False):  # a frozen script has no mode
        where = f"{type(module).__name__} ({name!r})" if name else type(module).__name__
        advice = "call model.eval() first"
        if "eval" in vars(module):  # torch.export replaces it by a function that raises
            advice = "the mode of an exported program is unknown, so pass the network that was exported"
        raise ValueError(f"forward: expected a model in eval mode, but {where} is in train mode; {advice}")
