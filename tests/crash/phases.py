"""Writes where a run is to a file that outlives it.

Only what marks the phases is added; the code in between is the real one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

from mmengine.fileio import LocalBackend
from mmengine.model import BaseModel
from mmengine.runner import ValLoop

from enc_plugin import checkpoint_files
from enc_plugin.engine import RNGStateHook, checkpoint_hook, fgsm_hook, gbr_hook, runner

WIDTH = 16  # characters of the file


def read(path: Path) -> str:
    """The phase that a process is in, or was in when it died."""
    return path.read_text().strip() if path.is_file() else ""


def mark(path: Path) -> None:
    """Let this process write its phases to ``path``."""
    file, phases = os.open(path, os.O_RDWR | os.O_CREAT), [""]

    @contextmanager
    def phase(name: str):
        phases.append(name)
        os.pwrite(file, name.ljust(WIDTH).encode(), 0)
        try:
            yield
        finally:
            phases.pop()
            os.pwrite(file, phases[-1].ljust(WIDTH).encode(), 0)

    def wrap(owner, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        @wraps(original)
        def marked(*args, **kwargs):
            with phase(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, marked)

    def wrap_replacing(module, replacing: Callable) -> None:
        @contextmanager
        def marked(path):
            with phase("pointer" if Path(path).name == "last_checkpoint" else "checkpoint"), replacing(path) as partial:
                yield partial

        module.replacing = marked

    wrap(BaseModel, "train_step", "step")
    wrap(ValLoop, "run_iter", "validation")
    wrap(gbr_hook, "measure_gbr", "gbr")
    wrap(fgsm_hook, "measure_robustness", "fgsm")
    wrap(RNGStateHook, "before_train", "resume")
    wrap(LocalBackend, "put", "writing")
    wrap(checkpoint_files, "_sync", "syncing")
    wrap_replacing(runner, runner.replacing)
    wrap_replacing(checkpoint_hook, checkpoint_hook.replacing)
