"""Contexts for trial runs of a network, which restore the network afterwards."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..functional.precision import full_float32
from ..functional.rng import kept_random_states
from ..layers import ENCLayer


def without_wrappers(model: nn.Module) -> nn.Module:
    """The network inside of ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.get_submodule("module")
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model.get_submodule("_orig_mod")
        else:
            return model


@contextmanager
def restored(model: nn.Module, training: bool = False, all_hooks: bool = False) -> Iterator[None]:
    """Set ``model`` to eval (or train) mode, and restore attributes, hooks and random states on exit.

    Within the context, forward hooks that do not belong to the network itself are off unless ``all_hooks``, and so are
    TensorFloat-32 and autocast, so that results are compared without their rounding. Buffers are not restored.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    saved = []
    for module in modules:
        contents = [(v, v.copy()) for v in module.__dict__.values() if isinstance(v, (dict, list, set, deque))]
        saved.append((module, dict(module.__dict__), contents))
    own = {id(x) for module in modules for x in (module, *module.__dict__.values())}
    with kept_random_states({t.device for t in model.parameters() if t.is_cuda}, model), full_float32():
        try:
            for module in modules:
                # eval() is not called, because some networks override it to merge weights or clear caches.
                module.__dict__["training"] = training
                for key in () if all_hooks else ("_forward_hooks", "_forward_pre_hooks"):
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
    """Whether a hook belongs to the network: to a module, to an attribute of one, or to torch (weight_norm, prune)."""
    while isinstance(hook, partial):
        hook = hook.func
    owner = getattr(hook, "__self__", hook)
    return id(owner) in own or type(owner).__module__.startswith("torch.nn.utils")


@contextmanager
def plain_forward(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, the ENC layers among ``layers`` compute with W, as in the network before conversion."""
    # A parametrized layer is left out, because its weight is a property of its class.
    enc = [x for x in layers if isinstance(x, ENCLayer) and not parametrize.is_parametrized(x)]
    changes: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = [(x, type(x), x.plain_class) for x in enc]
    for layer, _, plain in changes:
        layer.__class__ = plain
    try:
        yield
    finally:
        for layer, own, _ in changes:
            layer.__class__ = own
