"""Settings of all tests: one thread, a fixed hypothesis profile, no state carried from test to test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

from enc_plugin.installation import is_installed  # noqa: E402

hypothesis.settings.register_profile("default", deadline=None, max_examples=40, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_finish():
    if is_installed("mmengine"):  # the CUDA suite works with torch alone, too
        from helpers import quicken

        quicken()
