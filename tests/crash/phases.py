"""Imported by the config of a run that is going to be killed: writes where the run is to a file that outlives it.

Only what marks the phases is added; the code in between is the real one.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

from mmengine.fileio import LocalBackend
from mmengine.model import BaseModel
from mmengine.runner import ValLoop

import enc_plugin.engine.checkpoint_hook
import enc_plugin.engine.fgsm_hook
import enc_plugin.engine.gbr_hook
import enc_plugin.engine.runner
from enc_plugin.engine import RNGStateHook

WIDTH = 16
_FILE = os.open(os.environ["PHASE_FILE"], os.O_RDWR | os.O_CREAT) if "PHASE_FILE" in os.environ else None


def read(path: Path) -> str:
    """The phase that a process is in, or was in when it died."""
    return path.read_text().strip() if path.is_file() else ""


def _write(phase: str) -> None:
    os.pwrite(_FILE, phase.ljust(WIDTH).encode(), 0)


_stack = [""]


@contextmanager
def _phase(name: str):
    _stack.append(name)
    _write(name)
    try:
        yield
    finally:
        _stack.pop()
        _write(_stack[-1])


def _mark(owner, attribute: str, name: str) -> None:
    original = getattr(owner, attribute)

    @wraps(original)
    def marked(*args, **kwargs):
        with _phase(name):
            return original(*args, **kwargs)

    setattr(owner, attribute, marked)


def _mark_replacing(module) -> None:
    original = module.replacing

    @contextmanager
    def marked(path):
        with _phase("pointer" if Path(path).name == "last_checkpoint" else "checkpoint"), original(path) as partial:
            yield partial

    module.replacing = marked


if _FILE is not None:
    _mark(BaseModel, "train_step", "step")
    _mark(ValLoop, "run_iter", "validation")
    _mark(enc_plugin.engine.gbr_hook, "measure_gbr", "gbr")
    _mark(enc_plugin.engine.fgsm_hook, "measure_robustness", "fgsm")
    _mark(RNGStateHook, "before_train", "resume")
    _mark_replacing(enc_plugin.engine.runner)
    _mark_replacing(enc_plugin.engine.checkpoint_hook)
    _mark(LocalBackend, "put", "writing")
