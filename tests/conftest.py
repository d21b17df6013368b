"""Settings of all tests: one thread, a fixed hypothesis profile, no state carried from test to test."""

from __future__ import annotations

import functools
import gc
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


@pytest.fixture(autouse=True, scope="session")
def _quick_configs():
    """Configs as mmengine writes them, but not formatted by yapf, which takes half of the time of a short run.

    mmengine formats the config for each log, dump and checkpoint (``format_python_code=False`` of ``Config.fromfile``
    is lost on the way), and parses mmpretrain's 85 metafiles for every ``mmpretrain::`` base.
    """
    if not is_installed("mmengine"):  # the CUDA suite works with torch alone, too
        yield
        return
    import mmengine.config

    with pytest.MonkeyPatch.context() as patch:
        metainfo = functools.cache(mmengine.config.utils._get_cfg_metainfo)
        patch.setattr(mmengine.config.utils, "_get_cfg_metainfo", metainfo)
        patch.setattr(mmengine.config.config, "FormatCode", lambda text, **_: (text, True), raising=False)
        yield


def pytest_collection_finish():
    # Each data set of mmengine collects garbage: what has been imported is none, and need not be looked through again.
    gc.freeze()
