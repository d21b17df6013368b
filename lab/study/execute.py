"""Carries a study's runs out: one process a run, one small JSON a finished run, what is done is not done again."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.registry import RUNNERS
from torch import nn

from enc_plugin.build import stack_pictures
from enc_plugin.measuring.untouched import unwrap
from enc_plugin.reports.runs import load_run

from ..provenance import gpu, provenance
from .grid import PlannedRun
from .measures import measure, training_images

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"

# What is read from the training log for each epoch, where it was logged.
_BY_EPOCH = ("loss", "accuracy/top1", "gbr/logits", "gbr/logits_sem", "gbr/probs", "gbr/probs_sem")
_MEASURED = ("fgsm/", "gbr/")


def runs_folder(study: str | Path) -> Path:
    """Where a study's folder holds the results of its runs."""
    return Path(study, "runs")


def result_path(results: str | Path, run: PlannedRun) -> Path:
    """Where the result of a run is, or will be."""
    return Path(results, f"{run.id}.json")


def read_result(results: str | Path, run: PlannedRun) -> dict | None:
    """The result of a run that is done, failed runs too; None if it is still to do."""
    path = result_path(results, run)
    return json.loads(path.read_text()) if path.is_file() else None


def pending(runs: Sequence[PlannedRun], results: str | Path, retry_failed: bool = False) -> list[PlannedRun]:
    """The runs without a result, in order; with ``retry_failed`` those that failed, too."""
    left = []
    for run in runs:
        found = read_result(results, run)
        if found is None or (retry_failed and found["status"] == FAILED):
            left.append(run)
    return left


def describe(run: PlannedRun) -> dict:
    """What a result says of its run, whatever became of it."""
    arena = run.cell.arena
    return {
        "id": run.id,
        "arena": arena.name,
        "cell": run.cell.name,
        "title": run.cell.title,
        "seed": run.seed,
        "config": arena.config,
        "overrides": run.overrides,
        "images": arena.images,
        "epochs": arena.epochs,
    }


def execute(run: PlannedRun, results: str | Path, work: str | Path, root: str | Path = ".") -> dict:
    """Train and measure one run in this process, and write its result whole or not at all.

    Args:
        run: The run.
        results: Folder of the results; this one's is ``<arena>/<cell>-seed<N>.json``.
        work: Folder for checkpoints and logs, below which the run has its own while it lasts. A run that was stopped
            goes on from its last checkpoint, exactly (:class:`enc_plugin.engine.RNGStateHook`).
        root: The project's folder, which the arena's config is relative to.

    Returns:
        The result as it was written. A run that diverged has ``status='diverged'``; one that raised has
        ``status='failed'`` and its traceback.
    """
    work_dir = Path(work, run.id)
    result = {**describe(run), "provenance": provenance(root)}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        result["resumed"] = (work_dir / "last_checkpoint").is_file()
        measured = _train_and_measure(run, work_dir, root)
        result |= {"status": status_of(measured["final"]), **measured}
        result["provenance"] |= gpu()  # the run has set cuDNN since
    except Exception as error:
        result |= outcome_of(error)
    result["seconds"] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    write_result(result_path(results, run), result)
    if result["status"] != FAILED:
        shutil.rmtree(work_dir, ignore_errors=True)
    return result


def _train_and_measure(run: PlannedRun, work_dir: Path, root: str | Path) -> dict:
    cfg, arena = run.config(root), run.cell.arena
    cfg.work_dir = str(work_dir)
    cfg.launcher = "none"
    cfg.resume = (work_dir / "last_checkpoint").is_file()
    cfg.experiment_name = run.id.replace("/", "_")
    stack_pictures(cfg)
    runner = RUNNERS.build(cfg)
    channels_last(unwrap(runner.model))
    runner.train()
    log = load_run(work_dir)
    # Losses are logged several times an epoch, each the mean over the iterations before: the last one stands for it.
    by_epoch = {key: list(dict(log.scalars[key]).items()) for key in _BY_EPOCH if key in log.scalars}
    final = {
        "top1": log.last("accuracy/top1"),
        **{key: log.last(key) for key in sorted(log.scalars) if key.startswith(_MEASURED) and "seconds" not in key},
        **measure(unwrap(runner.model), training_images(runner.cfg), runner.val_dataloader.dataset, arena.pgd),
    }
    seconds = {key: sum(log.values(key)) for key in ("gbr/seconds", "fgsm/seconds")}
    seconds["an_iteration"] = log.seconds_per_iteration
    return {"by_epoch": by_epoch, "final": final, "measured_seconds": seconds}


def status_of(final: dict) -> str:
    """Status of a run that has been trained to its end."""
    return FINISHED if math.isfinite(final["test_loss"]) else DIVERGED


def outcome_of(error: Exception) -> dict:
    """What a result says of a run that ``error`` has ended. Call it where the error is handled.

    A failed run is a result too: it is listed, and not tried again and again.
    """
    if isinstance(error, FloatingPointError):  # ENCGuardHook, or a loss that is not finite
        return {"status": DIVERGED, "error": str(error)}
    return {"status": FAILED, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def core_seconds(result: dict) -> float | None:
    """What a run took; not known if it was stopped and resumed, or shared its process with others."""
    return None if result.get("resumed") or result.get("side_by_side") else result["seconds"]["cpu"]


def channels_last(model: nn.Module) -> None:
    """Compute in channels-last layout, which convolutions hand on: a third faster on a CPU, equal but for rounding."""
    # The weights keep their layout: mmcv's ConvWS2d takes views of them.
    model.backbone.register_forward_pre_hook(
        lambda backbone, inputs: (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
    )


def write_result(path: Path, result: dict) -> None:
    """Write JSON in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(as_json(result), indent=1) + "\n")
    os.replace(partial, path)


def as_json(value):
    """Data for a JSON file: numbers have six digits, and those that are not finite become null."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
