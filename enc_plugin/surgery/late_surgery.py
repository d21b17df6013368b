"""Checks for networks that were wrapped or given to an optimizer before :func:`enc_plugin.to_enc` added parameters."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ..layers import ENCLayer
from ..table import first_few


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ``ValueError`` if ``model`` is already wrapped for distributed training.

    A wrapper does not reduce gradients of parameters that are added later, so they would differ between processes.

    Args:
        model: A wrapper, a network with wrapped parts, or the network inside of a wrapper.
    """
    own = set(model.modules())
    wrapper = next((type(m) for m in own if isinstance(m, _distributed_wrappers())), None)
    if wrapper is None and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a wrapper may be garbage
        live = _live_objects(_distributed_wrappers())
        wrapper = next((type(w) for w in live if not own.isdisjoint(w.modules())), None)
    if wrapper is not None:
        raise ValueError(
            f"model: it is already wrapped by {wrapper.__name__}, which would not synchronise the parameters that "
            "to_enc adds (batch norms after layers, learnable alphas); call to_enc first, then wrap the model"
        )


def _distributed_wrappers() -> tuple[type, ...]:
    found: list[type] = [nn.parallel.DistributedDataParallel]
    if distributed.is_available():
        from torch.distributed import fsdp

        found += [fsdp.FullyShardedDataParallel, fsdp.FSDPModule]
    return tuple(found)


def _live_objects(types: type | tuple[type, ...]) -> Iterator[Any]:
    # type() and not isinstance(), because proxy objects run code for the latter.
    return (x for x in gc.get_objects() if issubclass(type(x), types))


class _StepWatch:
    """An optimizer hook that warns if an optimizer trains a layer's weight, but none trains the added parameters."""

    def __init__(self) -> None:
        self.layers: weakref.WeakKeyDictionary[ENCLayer, str] = weakref.WeakKeyDictionary()
        self.seen: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self.hook: RemovableHandle | None = None

    def add(self, layers: Iterable[tuple[str, ENCLayer]]) -> None:
        self.layers.update((layer, name) for name, layer in layers)
        self.seen.clear()
        if self.hook is None and self.layers:
            self.hook = register_optimizer_step_pre_hook(self.before_step)

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Check the layers whose weights ``optimizer`` trains, each layer once."""
        if torch.compiler.is_compiling() or self.seen.get(optimizer) == len(optimizer.param_groups):
            return
        self.seen[optimizer] = len(optimizer.param_groups)
        trained = _parameters_of([optimizer])
        layers = [x for x in self.layers if any(id(p) in trained for p in x.free_weights())]
        added = [pair for layer in layers for pair in _added(layer, self.layers.pop(layer))]
        missing = {name: p for name, p in added if p.requires_grad and id(p) not in trained}
        if missing:
            gc.collect()  # removes unused optimizers
            elsewhere = _parameters_of(_live_objects(Optimizer))
            missing = {name: p for name, p in missing.items() if id(p) not in elsewhere}
        if missing:
            names = first_few(list(map(repr, missing)))
            warnings.warn(
                f"{type(optimizer).__name__} trains layers to which to_enc added parameters, but no optimizer holds "
                f"{len(missing)} of these: {names}. They will not be trained. Create the optimizer after to_enc, or "
                "pass them to optimizer.add_param_group",
                UserWarning,
                stacklevel=3,
            )
        if not self.layers and self.hook is not None:
            self.hook.remove()
            self.hook = None


_watch = _StepWatch()


def watch_optimizers(layers: Iterable[tuple[str, ENCLayer]]) -> None:
    """Warn at the first optimizer step if the optimizer trains a layer's weight, but not the added parameters.

    This happens if the optimizer was created before :func:`enc_plugin.to_enc`, or from an older list of parameters.

    Args:
        layers: Names and ENC layers with a post-norm or a learnable alpha. Each is checked once.
    """
    _watch.add(layers)


def _added(layer: ENCLayer, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    prefix = f"{name}." if name else ""
    if layer.enc_log_alpha is not None:
        yield f"{prefix}log_alpha", layer.enc_log_alpha
    if layer.enc_norm is not None:
        for key, param in layer.enc_norm.named_parameters():
            yield f"{prefix}{layer._enc_norm_name}.{key}", param


def _parameters_of(optimizers: Iterable[Optimizer]) -> set[int]:
    """Ids of the parameters that the optimizers hold."""
    groups = (group for x in optimizers for group in getattr(x, "param_groups", ()))
    return {id(p) for group in groups for p in group["params"]}
