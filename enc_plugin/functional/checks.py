"""Checks of arguments: the error names the argument, what was expected and what came, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor, nn


def check_integer(name: str, value: object, minimum: int, *, below: int | None = None, none: str | None = None) -> None:
    """Refuse what is no integer of at least ``minimum``.

    Args:
        name: Of the argument.
        value: What came. Truth values are no integers here: they come from a slip in a config.
        minimum: The least that is accepted.
        below: The least that is too large; None: there is none.
        none: What None means; without it None is refused.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is out of the range.
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
    """Refuse what is no integer from 0 to 2^32 - 1: what every random generator takes."""
    check_integer(name, value, 0, below=2**32)


def check_number(name: str, value: object, expected: str, accepts: Callable[[float], bool]) -> None:
    """Refuse what is no real number, or one that ``accepts`` does not take.

    Args:
        name: Of the argument.
        value: What came.
        expected: The range in words.
        accepts: The range; false for NaN.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of the range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not accepts(cast(float, value)):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_type(name: str, value: object, types: Any, expected: str) -> None:
    """Raise ``TypeError`` unless ``value`` is of one of ``types``, which ``expected`` puts in words."""
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
    """Whether the elements are integers, truth values not among them."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_class_numbers(name: str, labels: Tensor, num_classes: int) -> None:
    """Raise ``ValueError`` unless all ``labels`` are classes, 0 to ``num_classes - 1``; waits for the device."""
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
