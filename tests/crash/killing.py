"""Trains the digits in processes that are killed (SIGKILL) at chosen phases, and resumes them until they are done."""

from __future__ import annotations

import os
import random
import re
import runpy
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from helpers import ROOT, digits_config, quicken
from phases import mark, read

# What a kill aims at: the phases (tests/crash/phases.py) that count as hit.
KINDS = {
    "step": ("step",),
    "saving": ("checkpoint", "pointer"),
    "writing": ("writing", "syncing"),
    "hook": ("gbr", "fgsm"),
    "validation": ("validation",),
    "anywhere": (),
}


@dataclass
class Survived:
    """What happened to a run."""

    died_in: Counter = field(default_factory=Counter)
    torn_files: int = 0  # unfinished files that a kill left behind, none of them under a checkpoint's name
    resumed_from: list[int] = field(default_factory=list)  # epochs

    def hits(self, kind: str) -> int:
        """Kills that found the run in a phase of this kind."""
        return sum(self.died_in[phase] for phase in KINDS[kind])


def make_config(work_dir: Path, epochs: int, workers: int = 0) -> Path:
    """Config with both measuring hooks, best and last checkpoints; two of the latter are kept."""
    cfg = digits_config(
        work_dir,
        epochs=epochs,
        train_dataloader__num_workers=workers,
        train_dataloader__persistent_workers=workers > 0,
        default_hooks__logger__interval=1,
        default_hooks__checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2, save_best="auto"),
        model__train_cfg=dict(augments=dict(type="Mixup", alpha=0.2)),
    )
    cfg.custom_hooks = [
        dict(type="GBRHook", num_samples=32, batch_size=16),
        dict(type="FGSMHook", eps=[4], num_samples=32),
    ]
    work_dir.mkdir(parents=True)
    path = work_dir / "config.py"
    cfg.dump(path)
    return path


def start(config: Path, phase_file: Path | None = None) -> BaseProcess:
    """``tools/train.py CONFIG --resume`` in a process of its own, its output in ``output.txt`` beside the config."""
    # The server imports the package once and forks: a life costs what training costs.
    context = get_context("forkserver")
    context.set_forkserver_preload(["enc_plugin", "mmpretrain.datasets", "mmpretrain.models"])
    process = context.Process(target=_live, args=(config, phase_file))
    process.start()
    return process


def _live(config: Path, phase_file: Path | None) -> None:
    quicken()
    torch.set_num_threads(1)
    output = os.open(config.with_name("output.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if phase_file is not None:
        mark(phase_file)
    sys.path.insert(0, str(ROOT / "tools"))
    sys.argv = ["train.py", str(config), "--work-dir", str(config.parent), "--resume"]
    runpy.run_path(str(ROOT / "tools" / "train.py"), run_name="__main__")


def kill_and_resume(config: Path, kills: int, seed: int, kinds: tuple[str, ...] = tuple(KINDS)) -> Survived:
    """Kill the run ``kills`` times, aiming at each kind in turn, check what is left each time, and let it finish."""
    work_dir, rng, survived = config.parent, random.Random(seed), Survived()
    phase_file = work_dir / "phase"
    for number in range(kills):
        kind = kinds[number % len(kinds)]
        phase_file.unlink(missing_ok=True)
        pointer = _pointer(work_dir)
        process = start(config, phase_file)
        _wait_until(process, lambda: read(phase_file) not in ("", "resume"))  # training, and not still starting
        if rng.random() < 0.5:  # a life that writes a checkpoint, where others do not get that far
            _wait_until(process, lambda pointer=pointer: _pointer(work_dir) != pointer)
        _wait_for_phase(process, phase_file, kind)
        if kind == "anywhere":
            time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -9, f"the run ended by itself ({process.exitcode}) before kill {number + 1}"
        survived.died_in[read(phase_file)] += 1
        survived.torn_files += bool(list(work_dir.glob(".*.partial*")))
        _check(work_dir)
    process = start(config)
    process.join()
    output = config.with_name("output.txt").read_text()
    assert process.exitcode == 0, output[-4000:]
    survived.resumed_from = [int(epoch) for epoch in re.findall(r"resumed epoch: (\d+)", output)]
    assert "cannot resume from" not in output  # no file was found damaged, none was missed
    return survived


def _wait_until(process: BaseProcess, condition: Callable[[], bool], pause: Callable[[], float] = lambda: 5e-4) -> None:
    """Look at ``condition`` every ``pause()`` seconds until it holds or the process ends."""
    deadline = time.monotonic() + 240
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline
        time.sleep(pause())


def _wait_for_phase(process: BaseProcess, phase_file: Path, kind: str) -> None:
    def pause() -> float:
        # Of the time that saving takes, writing the file is a moment.
        return 0 if kind == "writing" and read(phase_file) in KINDS["saving"] else 5e-4

    _wait_until(process, lambda: not KINDS[kind] or read(phase_file) in KINDS[kind], pause)


def _pointer(work_dir: Path) -> str:
    path = work_dir / "last_checkpoint"
    return path.read_text() if path.is_file() else ""


def _check(work_dir: Path) -> None:
    """All files under a checkpoint's name are whole, and ``last_checkpoint`` names one of them."""
    paths = list(work_dir.glob("[!.]*.pth"))  # unfinished files are hidden ones
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, path
        assert torch.load(path)["state_dict"], path
    # No pointer: killed before the first one, at most one checkpoint old.
    assert Path(_pointer(work_dir)) in paths if _pointer(work_dir) else len(paths) <= 1
