"""Saves and restores all random states of a run, including those in datasets, transforms, samplers and the model."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.runner import BaseLoop, Runner
from torch import Tensor

from ..measuring.untouched import unwrap

Generator = random.Random | np.random.Generator | np.random.RandomState | np.random.BitGenerator | torch.Generator

# Longer containers hold samples, not generators.
_MAX_ITEMS = 1000
_NO_OWNERS = (Tensor, np.ndarray, str, bytes, int, float, complex, type, type(None), types.ModuleType)


def run_generators(runner: Runner) -> dict[str, Generator]:
    """Generators in the model and in the datasets and samplers of training and validation, by path."""
    roots = {"model": unwrap(runner.model)}
    for name, loop in (("train", runner._train_loop), ("val", runner._val_loop)):
        if isinstance(loop, BaseLoop):
            loader = loop.dataloader
            roots |= {f"{name}_dataset": loader.dataset, f"{name}_collate": loader.collate_fn}
            roots |= {f"{name}_sampler": loader.sampler, f"{name}_batch_sampler": loader.batch_sampler}
    return owned_generators(**roots)


def random_states(runner: Runner) -> dict:
    """Random states of this process, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "generators": {name: _get_state(generator) for name, generator in run_generators(runner).items()},
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_states(runner: Runner, state: dict) -> None:
    """Restore what :func:`random_states` returned."""
    for name, generator in run_generators(runner).items():
        if name in state.get("generators", {}):
            _set_state(generator, state["generators"][name])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())  # a resumed checkpoint is loaded to the training device
    if torch.cuda.is_available():
        for device, value in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(value.cpu(), device)


def owned_generators(**roots: Any) -> dict[str, Generator]:
    """Generators in attributes, lists and dicts of objects at any depth, by path, such as ``'dataset.rng'``.

    Args:
        **roots: Objects to search, such as ``dataset=...``.
    """
    found, seen, waiting = {}, set(), list(roots.items())
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen or isinstance(value, _NO_OWNERS):
            continue
        seen.add(id(value))
        if isinstance(value, Generator):
            if not isinstance(value, random.SystemRandom):  # it has no state
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


def _get_state(generator: Generator) -> Any:
    """State of a generator, as plain values and tensors."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return getattr(generator, "bit_generator", generator).state


def _set_state(generator: Generator, state: Any) -> None:
    """Restore what ``_get_state`` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state
