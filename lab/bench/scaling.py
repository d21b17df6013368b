"""The time of GBR as a function of classes, projections, samples and processes; ResNet-20 (CIFAR), batch 8."""

from __future__ import annotations

import multiprocessing
import os
from functools import partial

import torch
from torch import nn

from enc_plugin.functional import gbr

from .harness import interleave, ratios
from .networks import resnet20

SAMPLES, BATCH = 16, 8


def _gbr(model: nn.Module, samples: int = SAMPLES, projections: int | None = None) -> None:
    gbr(model, torch.randn(samples, 3, 32, 32), projections=projections, batch_size=BATCH)


def _start() -> None:
    global _model
    torch.set_num_threads(1)
    _model = resnet20().eval()


def _share(samples: int) -> int:
    _gbr(_model, samples)
    return os.getpid()


def run(rounds: int = 7) -> dict:
    """Measure all four; takes about a minute on idle cores."""
    torch.manual_seed(0)
    model = resnet20().eval()
    by_classes = {f"{c} classes": partial(_gbr, resnet20(c).eval()) for c in (10, 20, 40, 80)}
    by_samples = {f"{n} samples": lambda n=n: _gbr(model, n) for n in (8, 16, 32, 64)}
    by_projections = {"exact": lambda: _gbr(model)}
    by_projections |= {f"{p} projections": lambda p=p: _gbr(model, projections=p) for p in (1, 2, 5, 10)}
    result: dict = {
        "what": f"GBR, ResNet-20 (CIFAR), 32 x 32, {SAMPLES} samples unless said otherwise",
        "to_10_classes": ratios(interleave(by_classes, rounds), "10 classes"),
        "to_8_samples": ratios(interleave(by_samples, rounds), "8 samples"),
        "to_exact": ratios(interleave(by_projections, rounds), "exact"),
    }
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, _start) as one, spawn.Pool(2, _start) as two:
        by_processes = {
            "1 process": lambda: one.map(_share, [4 * SAMPLES], chunksize=1),
            "2 processes": lambda: two.map(_share, [2 * SAMPLES] * 2, chunksize=1),
        }
        result["to_1_process"] = ratios(interleave(by_processes, rounds), "1 process")
    return result
