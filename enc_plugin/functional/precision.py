"""Float32 that means float32: measurements compute without TensorFloat-32, whatever a run has allowed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextmanager
def full_float32() -> Iterator[None]:
    """Block in which products and convolutions of float32 keep all its digits, on a GPU and on a CPU.

    TensorFloat-32, which cuDNN uses for convolutions by default, keeps 10 bits of a factor, bfloat16 keeps 7. Both are
    off within the block. All settings of before it are restored after it, also if it raises.
    """
    products = _readable(torch.get_float32_matmul_precision)
    convolutions = _readable(lambda: torch.backends.cudnn.allow_tf32)
    general, single = _settings()
    # The general ones first: a single one that is not set would be read as the general one.
    before = []
    for setting in general:
        before.append((setting, setting.fp32_precision))
        setting.fp32_precision = "none"
    before += [(setting, setting.fp32_precision) for setting in single]
    try:
        _set_legacy(products and "highest", convolutions and False)
        for setting in single:
            setting.fp32_precision = "ieee"
        yield
    finally:
        _set_legacy(products, convolutions)
        for setting, value in reversed(before):
            setting.fp32_precision = value


def float32_formats() -> dict[str, str]:
    """Format to which a GPU rounds the factors of float32 products and convolutions: ``'float32'`` or ``'tf32'``."""
    backends: Any = torch.backends  # of which torch declares a part
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    if hasattr(torch.backends, "fp32_precision"):
        found = {"products": matmul.fp32_precision, "convolutions": cudnn.conv.fp32_precision}
        return {name: "float32" if value in ("ieee", "none") else value for name, value in found.items()}
    found = {"products": matmul.allow_tf32, "convolutions": cudnn.allow_tf32}
    return {name: "tf32" if value else "float32" for name, value in found.items()}


def _settings() -> tuple[list[Any], list[Any]]:
    """Where torch from 2.9 on keeps the precision of float32: for all operators of a backend, and for single ones."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return [], []
    general = [backends, backends.cudnn, backends.mkldnn]
    single = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    return general, [*single, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]


def _readable(read: Callable[[], T]) -> T | None:
    """The value of an older switch; None if it cannot be read, because the newer settings contradict it."""
    try:
        return read()
    except RuntimeError:
        return None


def _set_legacy(products: str | None, convolutions: bool | None) -> None:
    """Set the older switches, but for None: torch.compile reads them, and raises where the two kinds differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch ask for the newer ones
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
