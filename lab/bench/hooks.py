"""Time that each hook adds to a run: training of the ENC ResNet-20 by ENCRunner on random images.

Times per iteration and per epoch are measured separately and combined for an epoch of 50,000 images.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, RUNNERS
from mmpretrain.datasets import BaseDataset

import enc_plugin  # noqa: F401
from enc_plugin.build import stack_pictures
from lab import ROOT

BATCH, BATCH_VAL, EPOCH = 128, 250, 50_000
BY_ITERATION = ("before_train_iter", "after_train_iter")
BY_VALIDATION = ("before_val_iter", "after_val_iter")
BY_EPOCH = (
    "before_train_epoch",
    "after_train_epoch",
    "before_save_checkpoint",
    "before_val",
    "before_val_epoch",
    "after_val_epoch",
    "after_val",
    "measure",  # of GBRHook and FGSMHook, at the end of a validation
)


@DATASETS.register_module()
class RandomPictures(BaseDataset):
    """Random images of 32 x 32 pixels, with the samples of a CIFAR10Folder."""

    METAINFO = {"classes": [str(i) for i in range(10)]}

    def __init__(self, count: int, **kwargs):
        self.count = count
        super().__init__(ann_file="", **kwargs)

    def load_data_list(self) -> list[dict]:
        rng = np.random.default_rng(0)
        return [
            {"img": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), "gt_label": i % 10} for i in range(self.count)
        ]


def config(work_dir: str, rounds: int, iterations: int, validation: int, samples: int) -> Config:
    """Config with ``rounds`` epochs of ``iterations`` steps, for the network of the study."""
    hooks = [
        dict(type="GBRHook", num_samples=samples, projections=None),
        dict(type="GBRHook", num_samples=samples, projections=1, name="logits_projected"),
        dict(type="FGSMHook", eps=(1, 2, 4, 8)),
        dict(type="ENCMonitorHook", interval=1),
    ]
    cfg = Config.fromfile(ROOT / "configs" / "cifar10" / "resnet20_enc-ws_2xb64.py")
    loader = dict(num_workers=0, persistent_workers=False, pin_memory=False)
    pipeline = cfg.train_dataloader.dataset.pipeline
    train = dict(_delete_=True, type="RandomPictures", count=iterations * BATCH, pipeline=pipeline)
    val = dict(_delete_=True, type="RandomPictures", count=validation, pipeline=cfg.val_dataloader.dataset.pipeline)
    cfg.merge_from_dict(
        dict(
            train_dataloader=dict(batch_size=BATCH, dataset=train, **loader),
            val_dataloader=dict(batch_size=BATCH_VAL, dataset=val, **loader),
            test_dataloader=dict(batch_size=BATCH_VAL, dataset=val, **loader),
            train_cfg=dict(max_epochs=rounds, val_interval=1),
            custom_hooks=hooks,
            work_dir=work_dir,
            launcher="none",
        )
    )
    return cfg


def label(hook: Hook) -> str:
    """Name of a hook in the table: its type, with the options that matter for its time."""
    name = type(hook).__name__
    if name == "GBRHook":
        return f"{name}, {'exact' if hook.projections is None else f'{hook.projections} projection'}"
    if name == "ENCMonitorHook":
        return f"{name}, every iteration"
    return f"{name}, {len(hook.eps)} eps" if name == "FGSMHook" else name


def time_stages(hook: Hook) -> dict[str, list[float]]:
    """Record the seconds of each call of each stage of ``hook`` from now on."""
    seconds: dict[str, list[float]] = {}

    def noting(call: Callable, notes: list[float]) -> Callable:
        def timed(*args, **kwargs):
            start = time.perf_counter()
            found = call(*args, **kwargs)
            notes.append(time.perf_counter() - start)
            return found

        return timed

    for stage in (*hook.get_triggered_stages(), *(["measure"] if hasattr(hook, "measure") else [])):
        setattr(hook, stage, noting(getattr(hook, stage), seconds.setdefault(stage, [])))
    return seconds


def run(rounds: int = 3, iterations: int = 20, validation: int = 10_000, samples: int = 512) -> dict:
    """Train ``rounds`` epochs of ``iterations`` steps and a validation; takes about five minutes on an idle core."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work_dir:
        cfg = config(work_dir, rounds, iterations, validation, samples)
        stack_pictures(cfg)
        runner = RUNNERS.build(cfg)
        seconds = {label(hook): time_stages(hook) for hook in runner.hooks}
        runner.train()
        whole = statistics.median(runner.message_hub.get_scalar("train/time").data[0])  # an iteration with all hooks
    by_iteration = {name: sum(_each(stages, BY_ITERATION)) for name, stages in seconds.items()}
    step = whole - sum(by_iteration.values())
    count, validations = EPOCH / BATCH, validation / BATCH_VAL
    rows = {}
    for name, stages in seconds.items():
        by_epoch = sum(_each(stages, BY_EPOCH)) + validations * sum(_each(stages, BY_VALIDATION))
        rows[name] = {
            "ms_per_iteration": 1e3 * by_iteration[name],
            "seconds_per_epoch": by_epoch,
            "percent_of_an_epoch": 100 * (by_iteration[name] + by_epoch / count) / step,
        }
    what = (
        f"hooks of an ENC ResNet-20 run, batch {BATCH}, compared with an epoch of {EPOCH} images; GBR on {samples} "
        f"samples, FGSM on {validation}"
    )
    return {"what": what, "step_ms": 1e3 * step, "counts": rows}


def _each(stages: dict[str, list[float]], names: Iterable[str]) -> list[float]:
    """Median seconds per call for each stage."""
    return [statistics.median(stages[name]) for name in names if stages.get(name)]
