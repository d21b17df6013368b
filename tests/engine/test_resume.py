"""A stopped and resumed run is the unbroken one, bit for bit: weights, optimizer, schedules, random states, logs."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import Stopped, assert_same, assert_same_run
from helpers import build_runner, digits_config, on_processes, train
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS
from mmengine.runner import Runner

from enc_plugin.engine import ENCRunner
from enc_plugin.models import ResNetCIFAR6n

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


@TRANSFORMS.register_module(force=True)
class _OwnNoise(BaseTransform):
    """Noise from generators of its own, of every kind."""

    def __init__(self):
        self.python = random.Random(0)
        self.more = {"numpy": [np.random.default_rng(0), np.random.RandomState(0)]}
        self.torch = torch.Generator().manual_seed(0)

    def transform(self, results: dict) -> dict:
        noise = self.python.gauss(0, 1) + torch.randn((), generator=self.torch).item()
        noise += self.more["numpy"][0].normal() + self.more["numpy"][1].normal()
        results["img"] = (results["img"] + 10 * noise).clip(0, 255).astype(np.uint8)
        return results


@MODELS.register_module(force=True)
class _Noisy(ResNetCIFAR6n):
    """Trains with noise from a generator of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        return super().forward(x + torch.randn(x.shape, generator=self.generator) if self.training else x)


OWN_NOISE, PACK = dict(type="_OwnNoise"), dict(type="PackInputs")
EMA = dict(type="EMAHook", momentum=0.1)
MONITOR = dict(type="ENCMonitorHook", interval=1)
EVERY_TWO = dict(type="CheckpointHook", by_epoch=False, interval=2)
WORKERS = dict(train_dataloader__num_workers=2, val_dataloader__num_workers=1)
PERSISTENT = WORKERS | dict(train_dataloader__persistent_workers=True, val_dataloader__persistent_workers=True)
MIXUP = dict(model__train_cfg=dict(augments=dict(type="Mixup", alpha=0.2)))
# Options of the run, where it is stopped (epochs from 0, validations and iterations from 1), its last checkpoint.
CASES = {
    "after an epoch's validation, penalty on the GBR": (
        dict(model__gbr_penalty=dict(weight=1e-3)),
        dict(epoch=1),
        "epoch_3.pth",
    ),
    "before it, dropblock and mixup": ({"name": "resnet8_dropblock_1xb64"} | MIXUP, dict(val=1), "epoch_3.pth"),
    "workers": (WORKERS | MIXUP, dict(epoch=1), "epoch_3.pth"),
    "persistent workers": (PERSISTENT | MIXUP, dict(val=2), "epoch_3.pth"),
    "bf16, averaging, accumulation": (
        dict(hooks=[EMA, MONITOR], optim_wrapper__type="AmpOptimWrapper", optim_wrapper__accumulative_counts=2),
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
    "a schedule with a function in its state": (
        dict(param_scheduler=[dict(type="OneCycleLR", eta_max=0.1, total_steps=9, by_epoch=False)]),
        dict(epoch=1),
        "epoch_3.pth",
    ),
    "generators of a transform's own": (
        dict(train_dataloader__dataset__pipeline=[OWN_NOISE, PACK], default_hooks__checkpoint=EVERY_TWO),
        dict(iter=5),
        "iter_9.pth",
    ),
    "a generator of the network's own": (dict(model__backbone__type="_Noisy") | MIXUP, dict(epoch=1), "epoch_3.pth"),
    "within an epoch, workers": (WORKERS | dict(default_hooks__checkpoint=EVERY_TWO), dict(iter=5), "iter_9.pth"),
    "at an epoch's last iteration": (
        dict(hooks=[MONITOR], default_hooks__checkpoint=EVERY_TWO),
        dict(val=2),
        "iter_9.pth",
    ),
    "iterations, before a validation": (by_iterations(interval=3), dict(val=2), "iter_9.pth"),
    "iterations, workers": (by_iterations(**WORKERS), dict(iter=5), "iter_9.pth"),
}


# Starting workers takes most of the time of these.
LONG = ("persistent workers", "iterations, workers")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in LONG else c for c in CASES])
def test_a_run_stopped(tmp_path, case):  # and resumed ends as the unbroken one
    options, stop, last = CASES[case]
    train(config(tmp_path / "unbroken", **options))
    hooks = [*options.get("hooks", []), dict(type="StopHook", **stop)]
    stopped = config(tmp_path / "resumed", **options | {"hooks": hooks})
    with pytest.raises(Stopped):
        train(stopped)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # what a new process would start from
    train(config(tmp_path / "resumed", **options, resume=True))
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed", last)
    files = [sorted(path.name for path in (tmp_path / run).glob("*.pth")) for run in ("unbroken", "resumed")]
    assert files[0] == files[1]


def test_a_seed_that_was_drawn_is_drawn_with_again(tmp_path):
    """Without a seed in the config every run draws one; a resumed run goes on with the first one's."""
    for work_dir, stop in ((tmp_path / "unbroken", []), (tmp_path / "resumed", [dict(type="StopHook", epoch=1)])):
        np.random.seed(7)  # what mmengine draws the seed from
        cfg = config(work_dir, epochs=2, hooks=stop, randomness=dict(seed=None))
        cfg.randomness.seed = None
        if stop:
            with pytest.raises(Stopped):
                train(cfg)
        else:
            train(cfg)
    np.random.seed(8)
    cfg.custom_hooks, cfg.resume = [], True
    runner = build_runner(cfg)
    drawn = runner.seed
    runner.train()
    assert runner.seed != drawn
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed", "epoch_2.pth")


def train_or_stop(path: Path, resume: bool) -> None:
    """Train the config at ``path``, and end quietly where it is stopped."""
    cfg = Config.fromfile(path)
    cfg.resume = resume
    if resume:
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type != "StopHook"]
    with suppress(Stopped):
        train(cfg)


@pytest.mark.timeout(900)
def test_two_processes_resume_exactly_and_one_says_what_it_cannot(tmp_path):
    """Gradients are pending at the stop, and each rank has statistics, gradients and random states of its own."""
    for name, stop in (("unbroken", []), ("resumed", [dict(type="StopHook", epoch=1)])):
        options = dict(train_dataloader__batch_size=32, optim_wrapper__accumulative_counts=2)
        cfg = config(tmp_path / name, "resnet8_dropblock_1xb64", epochs=2, hooks=stop, **options)
        cfg.launcher = "pytorch"
        cfg.randomness = dict(seed=0, diff_rank_seed=True)
        cfg.dump(tmp_path / f"{name}.py")
        on_processes(2, train_or_stop, tmp_path / f"{name}.py", False)
    on_processes(2, train_or_stop, tmp_path / "resumed.py", True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed", "epoch_2.pth")
    first, second = torch.load(tmp_path / "unbroken" / "epoch_1.pth")["rng_state"]["ranks"]
    assert first["python"] != second["python"]
    assert second["buffers"]
    assert first["gradients"].keys() == second["gradients"].keys() != set()

    cfg = config(tmp_path / "resumed", "resnet8_dropblock_1xb64", resume=True, **options)
    train(cfg)
    assert "the checkpoint was written with 2 processes, this run has 1" in log_of(tmp_path / "resumed")


def with_and_without_sharing(folder: Path) -> None:
    """Two epochs with AdamW, and with AdamW shared out among the processes, resumed after the first."""
    shared = dict(type="ZeroRedundancyOptimizer", optimizer_type="AdamW")
    for name, kind, end in (("whole", dict(type="AdamW"), 2), ("shared", shared, 1), ("shared", shared, 2)):
        cfg = digits_config(folder / name, epochs=end, optim_wrapper__paramwise_cfg=dict(shift_eps=0.5))
        cfg.train_dataloader.dataset.indices = 128
        cfg.optim_wrapper.optimizer = kind | dict(lr=0.01, weight_decay=0.1)
        cfg.launcher, cfg.resume = "pytorch", True
        train(cfg)


@pytest.mark.slow
def test_an_optimizer_that_processes_share_is_saved_and_shifted_as_a_whole(tmp_path):
    on_processes(2, with_and_without_sharing, tmp_path, timeout=240)
    whole, shared = (torch.load(tmp_path / name / "epoch_2.pth") for name in ("whole", "shared"))
    assert_same(shared["state_dict"], whole["state_dict"])
    assert len(shared["optimizer"]["state"]) == len(whole["optimizer"]["state"]) > 0


def log_of(work_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted(work_dir.glob("*/*.log")))


def test_a_checkpoint_without_random_states_resumes_with_a_warning(tmp_path):
    cfg = config(tmp_path, epochs=1)
    cfg.default_hooks.rng_state = None
    train(cfg)
    assert "rng_state" not in torch.load(tmp_path / "epoch_1.pth")
    train(config(tmp_path, epochs=2, resume=True))
    assert "the checkpoint holds no random states" in log_of(tmp_path)


def batches(
    workers: int, persistent: bool, epochs: list[int], build=ENCRunner.build_dataloader, **options
) -> list[torch.Tensor]:
    """The pixels of each of these epochs, randomly cropped, in file order."""
    crop = dict(type="mmpretrain.RandomCrop", crop_size=8, padding=3)
    loader = build(
        dict(
            batch_size=8,
            num_workers=workers,
            persistent_workers=persistent,
            sampler=dict(type="DefaultSampler", shuffle=False),
            dataset=dict(type="Digits", indices=32, pipeline=[crop, dict(type="mmpretrain.PackInputs")]),
            **options,
        ),
        seed=3,
    )
    found = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        found.append(torch.stack([picture for batch in loader for picture in batch["inputs"]]))
    return found


def test_workers_draw_other_augmentations_in_each_epoch_and_the_same_from_any_start():
    stock = batches(2, False, [0, 1], Runner.build_dataloader)
    assert torch.equal(stock[0], stock[1])  # what this is about
    first, second, third = batches(2, False, [0, 1, 2])
    assert torch.equal(first, stock[0])
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    persistent = batches(2, True, [0, 1, 2])
    assert_same(persistent, [first, second, third])
    assert_same(batches(2, True, [2]), [third])


def test_persistent_workers_take_nothing_from_the_generator_of_the_training():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches(2, True, [0, 1])
    assert torch.equal(torch.rand(3), expected)


def seed_with(worker: int, number: int) -> None:
    """A ``worker_init_fn`` of one's own."""
    np.random.seed(number + worker)


def test_a_worker_init_fn_of_the_config_is_left_alone():
    own = dict(type=seed_with, number=5)
    first, second = batches(2, False, [0, 1], worker_init_fn=own)
    assert torch.equal(first, second)
    assert_same(batches(2, False, [1], Runner.build_dataloader, worker_init_fn=own), [second])
