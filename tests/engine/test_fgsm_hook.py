"""FGSMHook in real runs: what it logs against independent measurements, and that the run does not notice it."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build_runner, digits_config, dist_train, free_port, scalars, train
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, DefaultScope
from mmengine.runner import load_checkpoint
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn
from torch.utils.data import Dataset

from enc_plugin.engine import FGSMHook
from enc_plugin.measuring.pixels import PixelClassifier
from enc_plugin.measuring.robustness import Robustness, measure_robustness, spread
from enc_plugin.measuring.untouched import untouched

MEAN, STD = [120.0, 115.0, 100.0], [60.0, 65.0, 70.0]
CLASSIFIERS = {
    "ENCImageClassifier": dict(
        type="ENCImageClassifier",
        backbone=dict(type="ResNetCIFAR6n", depth=8),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=10, in_channels=64),
    ),
    "ImageClassifier": dict(
        type="mmpretrain.ImageClassifier",
        backbone=dict(type="ResNetCIFAR6n", depth=8),
        neck=dict(type="mmpretrain.GlobalAveragePooling"),
        head=dict(type="mmpretrain.LinearClsHead", num_classes=10, in_channels=64),
    ),
    "TimmClassifier": dict(type="mmpretrain.TimmClassifier", model_name="test_resnet", num_classes=10),
}


class Noise(Dataset):
    """Coloured noise in 0..255, packed as a pipeline packs it."""

    def __init__(self, count: int = 21, size: int = 16):
        generator = torch.Generator().manual_seed(3)
        self.pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(0, 10, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"inputs": self.pixels[index], "data_samples": DataSample().set_gt_label(self.labels[index].item())}


class Stub(nn.Module):
    """Classifier whose logits are a function of the pixels: what PixelClassifier needs of a model and no more."""

    def __init__(self, logits):
        super().__init__()
        self.data_preprocessor = ClsDataPreprocessor()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.logits = logits

    def forward(self, inputs, mode):
        return self.logits(inputs)


def with_hook(work_dir, eps=(1, 8, 32), hook=None, **options):
    cfg = digits_config(work_dir, **options)
    cfg.custom_hooks = [dict(type="FGSMHook", eps=list(eps), **(hook or {}))]
    return cfg


def attacks(work_dir) -> list[dict]:
    return [line for line in scalars(work_dir) if "fgsm/top1_clean" in line]


def accuracies(line: dict) -> dict:
    return {key: value for key, value in line.items() if key.startswith("fgsm/top1")}


def test_logs_accuracy_per_eps_zero_gradients_and_seconds(tmp_path):
    runner = train(with_hook(tmp_path / "run", eps=(0.5, 8), epochs=1))
    (line,) = attacks(tmp_path / "run")
    names = ["top1_clean", "top1_eps0.5", "top1_eps8", "zero_grad", "averaged", "seconds"]
    assert list(line) == [*(f"fgsm/{name}" for name in names), "step"]
    assert line["fgsm/zero_grad"] == 0
    assert line["fgsm/seconds"] > 0
    assert line["step"] == runner.epoch == 1


def test_clean_accuracy_is_that_of_the_validation(tmp_path):
    train(with_hook(tmp_path / "run", epochs=2, optim_wrapper__optimizer__lr=0.02))
    validations = [line["accuracy/top1"] for line in scalars(tmp_path / "run") if "accuracy/top1" in line]
    assert [line["fgsm/top1_clean"] for line in attacks(tmp_path / "run")] == validations


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


def test_best_checkpoint_can_be_chosen_by_accuracy_under_attack(tmp_path):
    options = {"default_hooks__checkpoint__save_best": "fgsm/top1_eps8", "default_hooks__checkpoint__rule": "greater"}
    train(with_hook(tmp_path / "run", epochs=1, **options))
    assert list((tmp_path / "run").glob("best_fgsm_top1_eps8_epoch_1.pth"))


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
    with pytest.raises(ValueError, match=r"interval: with 2 .* save_best='fgsm/top1_eps8' .*set interval=1"):
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
    cfg = with_hook(tmp_path, hook=RAGGED, optim_wrapper__optimizer__lr=1e-3, load_from=str(trained))
    path = tmp_path / "config.py"
    cfg.dump(path)
    dist_train(path, 2, "--work-dir", str(tmp_path / "run"))
    (line,) = attacks(tmp_path / "run")
    found = measure_robustness(load(cfg, tmp_path / "run" / "epoch_1.pth"), digits_test(cfg), [1, 8, 32], **RAGGED)
    logged = accuracies(line)
    assert logged.pop("fgsm/top1_clean") == found.clean > 50
    assert list(logged.values()) == list(found.fgsm.values())
    assert found.fgsm[32] < found.clean
    assert line["fgsm/zero_grad"] == found.zero_grad


def rank_main(rank: int, processes: int, port: int, checkpoint: Path, results) -> None:
    """One rank that measures ``checkpoint``; all but rank 0 have wrong batch norm statistics, as after training."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    cfg = digits_config(checkpoint.parent)
    model = load(cfg, checkpoint)
    for buffer in model.buffers():
        buffer += rank
    before = [buffer.clone() for buffer in model.buffers()]
    found = measure_robustness(model, digits_test(cfg), [1, 8, 32], pgd_steps=2, **RAGGED)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    results.put((found.num_samples, found.clean, found.fgsm, found.pgd, found.zero_grad))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_three_processes_measure_exactly_what_one_does(trained):
    cfg = digits_config(trained.parent)
    found = measure_robustness(load(cfg, trained), digits_test(cfg), [1, 8, 32], pgd_steps=2, **RAGGED)
    alone = (found.num_samples, found.clean, found.fgsm, found.pgd, found.zero_grad)
    # The server imports the package once and forks; a fork of this process could not run autograd.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["enc_plugin"])
    results, port = context.SimpleQueue(), free_port()
    ranks = [context.Process(target=rank_main, args=(rank, 3, port, trained, results)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * 3
    assert [results.get() for _ in ranks] == [alone] * 3


@pytest.mark.parametrize("to_rgb", [False, True])
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_accuracy_is_that_of_an_attack_written_out_by_hand(classifier, to_rgb):
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            CLASSIFIERS[classifier],
            data_preprocessor=dict(type="mmpretrain.ClsDataPreprocessor", mean=MEAN, std=STD, to_rgb=to_rgb),
        )
    )
    data = Noise()
    found = measure_robustness(model, data, [2, 16], batch_size=8)

    model.eval()

    def logits(unit):
        x = unit.flip(1) if to_rgb else unit
        x = (x * 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return model.model(x) if classifier == "TimmClassifier" else model.head(model.extract_feat(x))

    unit = (data.pixels / 255).requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits(unit), data.labels), unit)
    for eps in (0, 2, 16):
        with torch.no_grad():
            predicted = logits((unit + eps / 255 * gradient.sign()).clamp(0, 1)).argmax(1)
        expected = (predicted == data.labels).double().mean().item() * 100
        assert (found.fgsm[eps] if eps else found.clean) == pytest.approx(expected)
    assert found.num_samples == 21


def test_attack_runs_in_float32_under_autocast():
    model = MODELS.build(
        dict(CLASSIFIERS["ImageClassifier"], data_preprocessor=dict(type="mmpretrain.ClsDataPreprocessor"))
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert PixelClassifier(model.eval())(torch.rand(2, 3, 8, 8)).dtype == torch.float32


def test_wrapping_a_model_leaves_frozen_layers_frozen():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    model[0].eval()
    assert PixelClassifier(model).training
    assert [module.training for module in model] == [False, True]


def test_samples_without_gradient_are_counted():
    # Every third image is black, and the logits of black images are flat.
    data = Noise(count=9)
    data.pixels[::3] = 0
    data.pixels[1::3] = data.pixels[1::3].clamp(min=1)
    found = measure_robustness(Stub(lambda x: x.relu().flatten(1)[:, :10] * (x.sum((1, 2, 3)) > 0)[:, None]), data, [1])
    assert found.zero_grad == 3 / 9


def test_samples_are_spread_over_a_sorted_dataset():
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(3, None) == spread(3, 7) == [0, 1, 2]
    labels = np.repeat(np.arange(10), 1000)
    assert np.bincount(labels[spread(10000, 100)]).tolist() == [10] * 10


def test_pgd_is_reproducible_and_batches_do_not_share_its_noise():
    # With steps far smaller than eps the random start shows through: record what the model sees.
    seen = []

    def logits(x):
        seen.append(x.detach().clone())
        return x.flatten(1)[:, :10]

    data = Noise(count=4)
    data.pixels[:] = 128
    first = measure_robustness(Stub(logits), data, [8], batch_size=2, pgd_steps=1)
    starts = [x[0] for x in seen if not torch.equal(x, torch.full_like(x, 128))]
    assert not torch.equal(starts[0], starts[-1])
    again = measure_robustness(Stub(logits), data, [8], batch_size=2, pgd_steps=1)
    assert (again.pgd, again.fgsm) == (first.pgd, first.fgsm)


def test_untouched_restores_modes_buffers_flags_and_random_states():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3))
    model[1].eval()
    model[2].with_cp = True
    mean = model[0].running_mean.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def measure():
        with untouched(model):
            assert not any(module.training for module in model.modules())
            assert not model[2].with_cp
            model[0].running_mean.fill_(7)
            torch.rand(1), np.random.rand(), random.random()
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        measure()
    assert [module.training for module in model] == [True, False, True]
    assert model[2].with_cp
    assert torch.equal(model[0].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_untouched_unwraps_forwards_that_mmengine_checkpoints():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    turn_on_activation_checkpointing(model, ["0", "0", "1"])  # 0 twice
    wrapped = [module.forward for module in model]
    x = torch.rand(2, 3, requires_grad=True)
    with untouched(model), torch.enable_grad():
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(gradient, (model[1].weight @ model[0].weight).sum(0).expand(2, 3))
    assert all(module.forward is forward for module, forward in zip(model, wrapped, strict=True))


def result(**values) -> Robustness:
    sound = dict(num_samples=100, clean=90.0, fgsm={1: 60.0, 8: 20.0}, pgd={1: 59.0, 8: 12.0}, pgd_steps=10)
    return Robustness(**(sound | dict(zero_grad=0.0, seconds=1.0) | values))


def test_sound_result_has_no_warning():
    assert result().warnings == []
    assert result(zero_grad=0.01).warnings == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (dict(clean=0.0, fgsm={1: 0.0}, pgd={}), "clean accuracy is 0 %"),
        (dict(fgsm={1: 60.0, 8: 91.0}, pgd={}), "FGSM at eps 8 raises the accuracy from 90.00 to 91.00 %"),
        (dict(pgd={8: 90.5}), "PGD-10 at eps 8 raises the accuracy"),
        (dict(zero_grad=0.011), "1.1% of the samples have an all-zero gradient"),
        (dict(pgd={8: 9.0}), "at eps 8 PGD-10 leaves 9.00 % and FGSM 20.00 %"),
    ],
)
def test_what_speaks_against_a_result_is_named(values, text):
    (warning,) = result(**values).warnings
    assert text in warning


def test_pipeline_that_normalises_is_refused_before_training(tmp_path):
    cfg = with_hook(tmp_path / "run")
    cfg.val_dataloader.dataset.pipeline.insert(0, dict(type="Normalize", mean=[0.0] * 3, std=[255.0] * 3, to_rgb=False))
    with pytest.raises(ValueError, match=r"expected pixels in 0..255, got 0..1; .*data_preprocessor"):
        train(cfg)


def test_images_of_different_sizes_are_refused():
    data = [{"inputs": torch.zeros(3, size, size), "data_samples": DataSample().set_gt_label(0)} for size in (4, 5)]
    with pytest.raises(ValueError, match="expected images of one size"):
        measure_robustness(Stub(lambda x: x), data, [1])


def test_sample_without_a_label_is_refused():
    data = [{"inputs": torch.zeros(3, 4, 4, dtype=torch.uint8), "data_samples": DataSample()}]
    with pytest.raises(ValueError, match="expected one gt_label"):
        measure_robustness(Stub(lambda x: x), data, [1])


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
