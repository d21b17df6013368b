"""Precision of measurements: float32 in full, without TensorFloat-32 and autocast, whatever the run has set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")  # types of devices


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 matrix products and convolutions at full precision within the block, on GPU and CPU.

    TensorFloat-32, which cuDNN uses for convolutions by default, rounds inputs to 10 mantissa bits, and bfloat16 to 7.
    In float16, gradients of confident predictions underflow to 0. The block turns them and autocast off. On exit, also
    after an exception, all settings are restored.
    """
    products = _readable(torch.get_float32_matmul_precision)
    convolutions = _readable(lambda: torch.backends.cudnn.allow_tf32)
    general, single = _settings()
    # General settings are read and cleared first, because an unset setting of an operator returns the general one.
    before = []
    for setting in general:
        before.append((setting, setting.fp32_precision))
        setting.fp32_precision = "none"
    before += [(setting, setting.fp32_precision) for setting in single]
    try:
        _set_legacy(products and "highest", convolutions and False)
        for setting in single:
            setting.fp32_precision = "ieee"
        with ExitStack() as stack:
            for kind in filter(torch.is_autocast_enabled, _AUTOCAST):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        _set_legacy(products, convolutions)
        for setting, value in reversed(before):
            setting.fp32_precision = value


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 in place of a half precision, whose sums of squares would overflow."""
    return torch.promote_types(dtype, torch.float32)


def float32_formats() -> dict[str, str]:
    """Format to which a GPU rounds the inputs of float32 products and convolutions: ``'float32'`` or ``'tf32'``."""
    backends: Any = torch.backends  # Any, because torch's type stubs are incomplete here
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    if hasattr(torch.backends, "fp32_precision"):
        found = {"products": matmul.fp32_precision, "convolutions": cudnn.conv.fp32_precision}
        return {name: "float32" if value in ("ieee", "none") else value for name, value in found.items()}
    found = {"products": matmul.allow_tf32, "convolutions": cudnn.allow_tf32}
    return {name: "tf32" if value else "float32" for name, value in found.items()}


def _settings() -> tuple[list[Any], list[Any]]:
    """The objects that hold the float32 precision in torch >= 2.9: general ones, and those of single operators."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return [], []
    general = [backends, backends.cudnn, backends.mkldnn]
    single = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    return general, [*single, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]


def _readable(read: Callable[[], T]) -> T | None:
    """The value of a setting of torch < 2.9, or None if reading it raises because newer settings contradict it."""
    try:
        return read()
    except RuntimeError:
        return None


def _set_legacy(products: str | None, convolutions: bool | None) -> None:
    """Set the settings of torch < 2.9 that are not None, because torch.compile raises if old and new ones differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch warn that these settings are deprecated
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
