"""Finds the checkpoint from which a run is resumed, and takes over its seed."""

from __future__ import annotations

import glob
import zipfile
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ..checkpoint_files import find_damage, latest_checkpoint


def find_checkpoint(runner: Runner) -> str | None:
    """Newest undamaged checkpoint of ``runner``, chosen by rank 0; None if there is no checkpoint.

    Raises:
        ValueError: If all checkpoints are damaged.
    """
    found: list = [None, []]
    if is_main_process():
        found = list(latest_checkpoint(runner.work_dir, _checkpoints(runner)))
    broadcast_object_list(found)
    path, problems = found
    if path is None and problems:
        raise ValueError(
            f"resume: every checkpoint in {runner.work_dir} is damaged ({'; '.join(problems)}); leave out --resume to "
            "train from the beginning"
        )
    for problem in problems:
        runner.logger.warning(f"ENC: cannot resume from {problem}")
    if problems:
        runner.logger.warning(f"ENC: resuming from the newest undamaged checkpoint {path}")
    return path


def _checkpoints(runner: Runner) -> Iterator[Path]:
    """Files of CheckpointHook that can be resumed from (not best_*.pth, which hold no optimizer)."""
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            folder = Path(hook.out_dir, Path(runner.work_dir).name) if hook.out_dir else Path(runner.work_dir)
            parts = Formatter().parse(hook.filename_tmpl)  # the number may have a format, as in 'epoch_{:03d}.pth'
            yield from folder.glob("".join(glob.escape(text) + "*" * (field is not None) for text, field, *_ in parts))


def take_seed(runner: Runner, filename: str) -> None:
    """Use the seed of a checkpoint from the start; mmengine would do so only after it has built the sampler."""
    if find_damage(filename) is not None:  # a URL, or a damaged file, for which loading raises an error
        return
    meta = torch.load(filename, map_location="cpu", mmap=zipfile.is_zipfile(filename)).get("meta") or {}
    seed, configured = meta.get("seed"), runner._randomness_cfg.get("seed")
    if seed is None or seed == configured:
        return
    if configured is not None:
        runner.logger.warning(
            f"ENC: the checkpoint has seed {seed}, the config {configured}; training continues with {seed}"
        )
    runner._randomness_cfg.update(seed=seed)
    runner.set_randomness(**runner._randomness_cfg)
