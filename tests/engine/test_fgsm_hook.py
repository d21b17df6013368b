"""FGSMHook in real runs: what it logs against independent measurements, and that the run does not notice it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import build_runner, digits_config, on_processes, scalars, train, train_on_processes
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, DefaultScope
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS
from torch import nn
from torch.utils.data import Dataset

from enc_plugin.engine import FGSMHook
from enc_plugin.measuring.robustness import measure_robustness


def with_hook(work_dir, eps=(1, 8, 32), hook=None, **options):
    cfg = digits_config(work_dir, **options)
    cfg.custom_hooks = [dict(type="FGSMHook", eps=list(eps), **(hook or {}))]
    return cfg


def attacks(work_dir) -> list[dict]:
    return [line for line in scalars(work_dir) if "fgsm/top1_clean" in line]


def accuracies(line: dict) -> dict:
    return {key: value for key, value in line.items() if key.startswith("fgsm/top1")}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory) -> Path:
    """Work dir of two epochs whose best checkpoint is chosen by the accuracy under attack."""
    torch.set_num_threads(1)
    work_dir = tmp_path_factory.mktemp("attacked")
    best = {"default_hooks__checkpoint__save_best": "fgsm/top1_eps8", "default_hooks__checkpoint__rule": "greater"}
    train(with_hook(work_dir, eps=(0.5, 8), epochs=2, optim_wrapper__optimizer__lr=0.02, **best))
    return work_dir


def test_logs_accuracy_per_eps_zero_gradients_and_seconds_by_epoch(attacked):
    lines = attacks(attacked)
    names = ["top1_clean", "top1_eps0.5", "top1_eps8", "zero_grad", "averaged", "seconds"]
    assert [list(line) for line in lines] == [[*(f"fgsm/{name}" for name in names), "step"]] * 2
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["fgsm/zero_grad"] == 0 and line["fgsm/seconds"] > 0 for line in lines)


def test_clean_accuracy_is_that_of_the_validation(attacked):
    validations = [line["accuracy/top1"] for line in scalars(attacked) if "accuracy/top1" in line]
    assert [line["fgsm/top1_clean"] for line in attacks(attacked)] == validations


def test_best_checkpoint_can_be_chosen_by_accuracy_under_attack(attacked):
    values = [line["fgsm/top1_eps8"] for line in attacks(attacked)]
    assert [path.name for path in attacked.glob("best_*")] == [
        f"best_fgsm_top1_eps8_epoch_{1 + values.index(max(values))}.pth"
    ]


def test_interval_counts_epochs_and_the_last_epoch_is_always_measured(tmp_path):
    train(with_hook(tmp_path / "run", hook=dict(interval=2), epochs=3))
    assert [line["step"] for line in attacks(tmp_path / "run")] == [2, 3]


def test_interval_counts_validations_where_training_goes_by_iterations(tmp_path):
    cfg = with_hook(tmp_path / "run", hook=dict(interval=2))
    cfg.train_cfg = dict(by_epoch=False, max_iters=5, val_interval=1)
    cfg.param_scheduler = None
    cfg.train_dataloader.sampler.type = "InfiniteSampler"
    train(cfg)
    assert [line["step"] for line in attacks(tmp_path / "run")] == [2, 4, 5]


@pytest.mark.parametrize("by_epoch", [True, False])
def test_save_best_that_would_miss_its_metric_is_refused_before_training(tmp_path, by_epoch):
    best = {"default_hooks__checkpoint__save_best": ["accuracy/top1", "fgsm/top1_eps8"]}
    cfg = with_hook(
        tmp_path / "run", hook=dict(interval=2), epochs=2, default_hooks__checkpoint__rule="greater", **best
    )
    if not by_epoch:
        cfg.train_cfg = dict(by_epoch=False, max_iters=4, val_interval=2)
        cfg.param_scheduler = None
        cfg.train_dataloader.sampler.type = "InfiniteSampler"
    with pytest.raises(ValueError, match=r"interval: with 2, .* save_best='fgsm/top1_eps8' .*set interval=1"):
        train(cfg)


def test_save_best_works_with_an_interval_that_leaves_out_no_validation(tmp_path):
    options = {"default_hooks__checkpoint__save_best": "fgsm/top1_eps8", "default_hooks__checkpoint__rule": "greater"}
    train(with_hook(tmp_path / "run", hook=dict(interval=2), epochs=3, train_cfg__val_interval=2, **options))
    assert [line["step"] for line in attacks(tmp_path / "run")] == [2, 3]


def test_ema_weights_are_attacked_where_they_are_validated(tmp_path):
    cfg = with_hook(tmp_path / "run", epochs=2, optim_wrapper__optimizer__lr=0.02)
    cfg.custom_hooks.append(dict(type="EMAHook", momentum=0.5))
    train(cfg)
    validations = [line["accuracy/top1"] for line in scalars(tmp_path / "run") if "accuracy/top1" in line]
    assert [line["fgsm/top1_clean"] for line in attacks(tmp_path / "run")] == validations
    model = load(cfg, tmp_path / "run" / "epoch_2.pth")  # EMAHook swaps the averaged weights in on saving
    found = measure_robustness(model, digits_test(cfg), [1, 8, 32], batch_size=128)
    assert found.clean == validations[-1]
    assert list(found.fgsm.values()) == list(accuracies(attacks(tmp_path / "run")[-1]).values())[1:]


def digits_test(cfg: Config) -> Dataset:
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return DATASETS.build(cfg.val_dataloader.dataset)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Checkpoint of a network that reads digits, and loses them under attack."""
    work_dir = tmp_path_factory.mktemp("trained")
    train(digits_config(work_dir, epochs=3, train_dataloader__dataset__indices=None))
    return work_dir / "epoch_3.pth"


def load(cfg: Config, checkpoint: Path) -> nn.Module:
    model = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))
    load_checkpoint(model, str(checkpoint), strict=True)
    return model


# 61 samples in 5 batches, the last one short: neither 2 nor 3 processes divide samples or batches.
RAGGED = dict(num_samples=61, batch_size=14)


def test_two_processes_log_what_one_measures_on_their_checkpoint(tmp_path, trained):
    # Training goes on, so that the ranks' batch norm statistics part before they are attacked.
    cfg = with_hook(tmp_path / "run", hook=RAGGED, optim_wrapper__optimizer__lr=1e-3, load_from=str(trained))
    train_on_processes(cfg, 2)
    (line,) = attacks(tmp_path / "run")
    found = measure_robustness(load(cfg, tmp_path / "run" / "epoch_1.pth"), digits_test(cfg), [1, 8, 32], **RAGGED)
    logged = accuracies(line)
    assert logged.pop("fgsm/top1_clean") == found.clean > 50
    assert list(logged.values()) == list(found.fgsm.values())
    assert found.fgsm[32] < found.clean
    assert line["fgsm/zero_grad"] == found.zero_grad


def measured(model: nn.Module, cfg: Config) -> str:
    found = measure_robustness(model, digits_test(cfg), [1, 8, 32], pgd_steps=2, **RAGGED)
    return repr((found.num_samples, found.clean, found.fgsm, found.pgd, found.zero_grad))


def measure_on_a_rank(checkpoint: Path, folder: Path) -> None:
    """Measure ``checkpoint``; all but rank 0 have wrong batch norm statistics, as after training."""
    torch.distributed.init_process_group("gloo")
    rank, cfg = torch.distributed.get_rank(), digits_config(checkpoint.parent)
    model = load(cfg, checkpoint)
    for buffer in model.buffers():
        buffer += rank
    before = [buffer.clone() for buffer in model.buffers()]
    (folder / f"{rank}.txt").write_text(measured(model, cfg))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


@pytest.mark.slow
def test_three_processes_measure_exactly_what_one_does(trained, tmp_path):
    cfg = digits_config(trained.parent)
    on_processes(3, measure_on_a_rank, trained, tmp_path)
    alone = measured(load(cfg, trained), cfg)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)] == [alone] * 3


def test_pipeline_that_normalises_is_refused_before_training(tmp_path):
    cfg = with_hook(tmp_path / "run")
    cfg.val_dataloader.dataset.pipeline.insert(0, dict(type="Normalize", mean=[0.0] * 3, std=[255.0] * 3, to_rgb=False))
    with pytest.raises(ValueError, match=r"expected pixels in 0..255, got 0..1; .*data_preprocessor"):
        train(cfg)


def test_run_without_validation_is_refused(tmp_path):
    cfg = with_hook(tmp_path / "run")
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    with pytest.raises(ValueError, match="set val_dataloader"):
        build_runner(cfg).train()


@pytest.mark.parametrize(
    "options", [dict(eps=[]), dict(eps=[1, 1]), dict(eps=0), dict(eps=[300]), dict(interval=0), dict(num_samples=0)]
)
def test_options_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: expected"):
        HOOKS.build(dict(type="FGSMHook", **options))


def test_one_eps_may_be_a_number():
    assert FGSMHook(eps=4).eps == [4]
