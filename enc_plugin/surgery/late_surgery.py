"""Parameters that :func:`enc_plugin.to_enc` adds to a network which a wrapper or an optimizer has seen before."""

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
    """Raise ``ValueError`` if a wrapper for distributed training has taken stock of the parameters of ``model``.

    Parameters that are added later would not be reduced over the processes, and each process would train its own.

    Args:
        model: The wrapper, a network with wrapped parts, or the network inside of a wrapper.
    """
    own = set(model.modules())
    wrapper = next((type(m) for m in own if isinstance(m, _distributed_wrappers())), None)
    if wrapper is None and distributed.is_available() and distributed.is_initialized():
        wrapper = _live_wrapper(own)
        if wrapper is not None:
            gc.collect()  # it may be one that nobody uses any more
            wrapper = _live_wrapper(own)
    if wrapper is not None:
        raise ValueError(
            f"model: it is wrapped by {wrapper.__name__} already, which would not synchronise the parameters that "
            "to_enc adds (batch norms behind layers, learnable alphas); call to_enc first, then wrap the model"
        )


def _live_wrapper(modules: set[nn.Module]) -> type | None:
    """Type of a wrapper somewhere in the process that has one of ``modules`` inside."""
    return next((type(w) for w in _live_objects(_distributed_wrappers()) if not modules.isdisjoint(w.modules())), None)


def _distributed_wrappers() -> tuple[type, ...]:
    found = [nn.parallel.DistributedDataParallel]
    if distributed.is_available():
        from torch.distributed import fsdp

        found += [getattr(fsdp, name) for name in ("FullyShardedDataParallel", "FSDPModule") if hasattr(fsdp, name)]
    return tuple(found)


def _live_objects(types: type | tuple[type, ...]) -> Iterator[Any]:
    # By type() and not by isinstance, because proxies of all kinds answer the latter.
    return (x for x in gc.get_objects() if issubclass(type(x), types))


class _StepWatch:
    """Looks, when an optimizer steps, for layers whose weight it trains while nobody trains what to_enc added."""

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
        """Look at the layers whose weights ``optimizer`` trains, each once."""
        if torch.compiler.is_compiling() or self.seen.get(optimizer) == len(optimizer.param_groups):
            return
        self.seen[optimizer] = len(optimizer.param_groups)
        trained = _parameters_of([optimizer])
        layers = [x for x in self.layers if any(id(p) in trained for p in x.free_weights())]
        added = [pair for layer in layers for pair in _added(layer, self.layers.pop(layer))]
        missing = {name: p for name, p in added if p.requires_grad and id(p) not in trained}
        if missing:
            gc.collect()  # an optimizer that nobody uses any more trains nothing
            elsewhere = _parameters_of(_live_objects(Optimizer))
            missing = {name: p for name, p in missing.items() if id(p) not in elsewhere}
        if missing:
            names = first_few(list(map(repr, missing)))
            warnings.warn(
                f"{type(optimizer).__name__} trains layers that to_enc has given parameters of their own, but no "
                f"optimizer holds {len(missing)} of these: {names}. They will not train. Make the optimizer after "
                "to_enc, or pass them to optimizer.add_param_group",
                UserWarning,
                stacklevel=3,
            )
        if not self.layers and self.hook is not None:
            self.hook.remove()
            self.hook = None


_watch = _StepWatch()


def watch_optimizers(layers: Iterable[tuple[str, ENCLayer]]) -> None:
    """Warn at the first step of an optimizer that trains the weight of a layer, but not what was added to the layer.

    That is so for one that was made before :func:`enc_plugin.to_enc`, or from parameters that were listed before.

    Args:
        layers: ENC layers with a post-norm or a learnable alpha, and their names. They are looked at once.
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
