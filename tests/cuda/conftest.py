"""The suite for a CUDA device (``make test-cuda``). Elsewhere every test here skips and says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Deterministic products need it before the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HERE = Path(__file__).parent

# How the names of the longest tests begin, the longest first: 99, 82, 24, 14 and 8 s on an H200.
LONG = (
    "test_a_run_trains_on_the_device_with_the_constraint_and_finite_measurements[compiled]",
    "test_the_demo_writes_its_report",
    "test_one_process_on_nccl_trains",
    "test_a_compiled_network_trains_as_the_eager_one",
    "test_all_kinds_of_runs_share_the_device_and_leave_results",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what lies in this folder where there is no device; else let the longest tests start first."""
    own = [item for item in items if HERE in item.path.parents]
    if not torch.cuda.is_available():
        for item in own:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        return
    own.sort(key=lambda item: next((i for i, name in enumerate(LONG) if item.name.startswith(name)), len(LONG)))
    # With "--dist worksteal", each worker starts with as many consecutive tests, so tests are dealt out like cards.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    others = [item for item in items if HERE not in item.path.parents]
    items[:] = others + [item for worker in range(workers) for item in own[worker::workers]]


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
