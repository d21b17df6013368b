"""Checks of arguments. Each error names the argument, what was expected, and what was given."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor, nn


def check_integer(name: str, value: object, minimum: int, *, below: int | None = None, none: str | None = None) -> None:
    """Raise ``TypeError`` unless ``value`` is an integer, and ``ValueError`` unless it is >= ``minimum``.

    Args:
        name: Name of the argument.
        value: Value of the argument. True and False do not count as integers, because they are mistakes in a config.
        minimum: Smallest accepted value.
        below: Exclusive upper bound, or None.
        none: Meaning of None, for the error message. If it is not given, None raises.
    """
    if value is None and none is not None:
        return
    kind: type[Exception]
    if isinstance(value, bool) or not isinstance(value, Integral):
        kind, expected = TypeError, f"an integer of at least {minimum}"
    elif int(value) < minimum:
        kind, expected = ValueError, f"at least {minimum}" if none is None else f"an integer of at least {minimum}"
    elif below is not None and int(value) >= below:
        kind, expected = ValueError, f"an integer from {minimum} to {below - 1}"
    else:
        return
    raise kind(f"{name}: expected {'' if none is None else f'None ({none}) or '}{expected}, got {value!r}")


def check_seed(name: str, value: object) -> None:
    """Raise unless ``value`` is an integer from 0 to 2^32 - 1, the range that NumPy and torch both accept."""
    check_integer(name, value, 0, below=2**32)


def check_number(name: str, value: object, expected: str, accepts: Callable[[float], bool]) -> None:
    """Raise ``TypeError`` unless ``value`` is a real number, and ``ValueError`` unless ``accepts(value)`` is true.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        expected: The accepted range in words.
        accepts: Whether a number is in the range. It must return False for NaN to make NaN raise.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not accepts(cast(float, value)):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_not_negative(name: str, value: object, hint: str = "") -> None:
    """Raise unless ``value`` is a finite number >= 0; ``hint`` is added to the message."""
    check_number(name, value, f"a finite number >= 0{hint}", lambda number: 0 <= number < math.inf)


def check_auto(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is True, False or ``'auto'``."""
    if not isinstance(value, bool) and not (isinstance(value, str) and value == "auto"):
        raise ValueError(f"{name}: expected 'auto', True or False, got {value!r}")


def check_type(name: str, value: object, types: Any, expected: str) -> None:
    """Raise ``TypeError`` unless ``value`` is an instance of ``types``; ``expected`` describes them in the message."""
    if not isinstance(value, types):
        raise TypeError(f"{name}: expected {expected}, got {_describe(value)}")


def check_model(model: object) -> None:
    """Raise ``TypeError`` unless ``model`` is an ``nn.Module``."""
    check_type("model", model, nn.Module, "a torch.nn.Module (of a runner: runner.model)")


def check_floating_tensor(name: str, value: object, hint: str = "") -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor of real floating point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_describe(value)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected floating point, got {value.dtype}{hint}")


def holds_integers(tensor: Tensor) -> bool:
    """Whether the dtype of ``tensor`` is an integer type; bool is not one."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_class_numbers(name: str, labels: Tensor, num_classes: int) -> None:
    """Raise ``ValueError`` unless all ``labels`` are within 0..``num_classes - 1``. Synchronizes with the device."""
    if labels.numel():
        low, high = (bound.item() for bound in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{name}: expected class numbers from 0 to {num_classes - 1}, since there are {num_classes} outputs, "
                f"got {low}..{high}"
            )


def _describe(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) < 60 else type(value).__name__
