"""A stopped and resumed run is the unbroken one, bit for bit: weights, optimizer, schedules, random states, logs."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import Stopped, assert_same_run
from helpers import build_runner, digits_config, free_port, train
from mmengine.config import Config
from torch.multiprocessing import get_context

from enc_plugin.engine import ENCRunner, RNGStateHook

FLIP = dict(type="RandomFlip", prob=0.5, direction="horizontal")


def config(
    work_dir: Path, name: str = "resnet8_enc-ws_1xb64", epochs: int = 3, hooks=(), train_cfg=None, **options
) -> Config:
    """Every iteration logged, and random numbers drawn in validation, too."""
    cfg = digits_config(work_dir, name, epochs=epochs, default_hooks__logger__interval=1, **options)
    cfg.train_cfg = train_cfg or cfg.train_cfg
    if not cfg.val_dataloader.persistent_workers:
        cfg.val_dataloader.dataset.pipeline.insert(0, FLIP)
    cfg.custom_hooks = list(hooks)
    return cfg


def by_iterations(**options) -> dict:
    """Options of a run of nine iterations without epochs."""
    return dict(
        train_cfg=dict(by_epoch=False, max_iters=9, val_interval=3),
        train_dataloader__sampler__type="InfiniteSampler",
        log_processor__by_epoch=False,
        param_scheduler=None,
        default_hooks__logger__log_metric_by_epoch=False,
        default_hooks__checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=options.pop("interval", 2)),
        **options,
    )


EMA = dict(type="EMAHook", momentum=0.1)
EVERY_TWO = dict(type="CheckpointHook", by_epoch=False, interval=2)
WORKERS = dict(train_dataloader__num_workers=2, val_dataloader__num_workers=1)
PERSISTENT = WORKERS | dict(train_dataloader__persistent_workers=True, val_dataloader__persistent_workers=True)
MIXUP = dict(model__train_cfg=dict(augments=dict(type="Mixup", alpha=0.2)))
# Options of the run, where it is stopped (epochs from 0, validations and iterations from 1), its last checkpoint.
CASES = {
    "after an epoch's validation": ({}, dict(epoch=1), "epoch_3.pth"),
    "before it, dropblock and mixup": ({"name": "resnet8_dropblock_1xb64"} | MIXUP, dict(val=1), "epoch_3.pth"),
    "penalty on the GBR": (dict(model__gbr_penalty=dict(weight=1e-3)), dict(epoch=1), "epoch_3.pth"),
    "workers": (WORKERS | MIXUP, dict(epoch=1), "epoch_3.pth"),
    "persistent workers": (PERSISTENT | MIXUP, dict(val=2), "epoch_3.pth"),
    "bf16, averaging, accumulation": (
        dict(hooks=[EMA], optim_wrapper__type="AmpOptimWrapper", optim_wrapper__accumulative_counts=2),
        dict(epoch=1),
        "epoch_3.pth",
    ),
    "best checkpoint, plateau schedule": (
        dict(
            default_hooks__checkpoint=dict(type="CheckpointHook", interval=1, save_best="auto", max_keep_ckpts=1),
            param_scheduler=[dict(type="ReduceOnPlateauLR", monitor="accuracy/top1", factor=0.5, patience=0)],
        ),
        dict(val=2),
        "epoch_3.pth",
    ),
    "within an epoch": (dict(default_hooks__checkpoint=EVERY_TWO), dict(iter=5), "iter_9.pth"),
    "within an epoch, workers": (WORKERS | dict(default_hooks__checkpoint=EVERY_TWO), dict(iter=5), "iter_9.pth"),
    "at an epoch's last iteration": (dict(default_hooks__checkpoint=EVERY_TWO), dict(val=2), "iter_9.pth"),
    "iterations": (by_iterations(), dict(iter=5), "iter_9.pth"),
    "iterations, before a validation": (by_iterations(interval=3), dict(val=2), "iter_9.pth"),
    "iterations, workers": (by_iterations(**WORKERS), dict(iter=5), "iter_9.pth"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped(tmp_path, case):
    options, stop, last = CASES[case]
    train(config(tmp_path / "unbroken", **options))
    with pytest.raises(Stopped):
        hooks = [*options.get("hooks", []), dict(type="StopHook", **stop)]
        train(config(tmp_path / "resumed", **options | {"hooks": hooks}))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # what a new process would start from
    train(config(tmp_path / "resumed", **options, resume=True))
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed", last)
    files = [sorted(path.name for path in (tmp_path / run).glob("*.pth")) for run in ("unbroken", "resumed")]
    assert files[0] == files[1]
