"""The suite for a CUDA device (``make test-cuda``). Elsewhere every test here skips and says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Deterministic products need it before the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what lies in this folder where there is no device."""
    if not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """The device under test."""
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _settings():
    """Float32 as torch has it by default, and none of a test's settings for the next one."""
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def exact_float32(_settings):
    """Float32 without TensorFloat-32, as the CPU computes it."""
    torch.backends.cudnn.allow_tf32 = False
