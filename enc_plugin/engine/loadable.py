"""Converts values for checkpoints to types that ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

import datetime
import enum
import io
import pickle
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def make_loadable(value: Any, name: str) -> Any:
    """Convert the parts of ``value`` that safe loading refuses to plain numbers, strings and containers.

    NumPy scalars and enum members become their values, paths and dates become strings, object arrays become lists, and
    other mappings and sequences become dicts, lists and tuples. Everything that can be loaded stays as it is.

    Args:
        value: Any part of a checkpoint; it is not changed.
        name: Name of ``value`` for errors, such as ``'meta'``.

    Raises:
        ValueError: If a part cannot be converted; the message contains the path to it.
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, (Tensor, torch.Size, HistoryBuffer)):
        return value
    if isinstance(value, np.generic):
        plain = value.item()
        return float(plain) if isinstance(plain, np.generic) else make_loadable(plain, name)  # longdouble stays
    if isinstance(value, np.ndarray):
        return make_loadable(value.tolist(), name) if value.dtype.hasobject or value.dtype.names else np.asarray(value)
    if isinstance(value, enum.Enum):
        return make_loadable(value.value, name)
    if isinstance(value, (PurePath, datetime.date, datetime.time, datetime.timedelta)):
        return str(value)
    if isinstance(value, _PLAIN):  # of a subclass
        return next(plain(value) for plain in _PLAIN if isinstance(value, plain))
    if isinstance(value, Mapping):
        items = {make_loadable(k, f"a key of {name}"): make_loadable(v, f"{name}[{k!r}]") for k, v in value.items()}
        if kind is OrderedDict:  # keep the attribute _metadata of state dicts
            items = OrderedDict(items)
            items.__dict__.update(value.__dict__)
        return Counter(items) if kind is Counter else items
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [make_loadable(item, f"{name}[{i}]") for i, item in enumerate(value)]
        plain = next(plain for plain in (list, tuple, set, frozenset) if isinstance(value, plain))
        return set(items) if plain is frozenset else plain(items)
    _check_loads(value, name)
    return value


def without_functions(state: Any) -> Any:
    """States of schedulers without functions (``anneal_func`` of ``OneCycleLR``), which the config's scheduler has."""
    if isinstance(state, Mapping):
        return {key: without_functions(value) for key, value in state.items() if not callable(value)}
    return [without_functions(value) for value in state] if isinstance(state, list) else state


def _check_loads(value: Any, name: str) -> None:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(
            f"checkpoint: {name} is a {kind}, which torch.load(weights_only=True) refuses, so the run could not be "
            "resumed; change the metric, dataset or hook that it comes from to use numbers, strings, tensors, or dicts "
            "and lists of them"
        ) from error
