import json
import math
from pathlib import Path

import pytest
import torch
from helpers import build_runner, digits_config, scalars, train, train_on_processes
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmpretrain import get_model
from torch import nn

from enc_plugin.datasets import Digits
from enc_plugin.engine import GBRHook

PACK = [dict(type="PackInputs")]


def run(work_dir, epochs=2, **options):
    hook = dict(type="GBRHook", num_samples=48, batch_size=16, **options)
    return train(digits_config(work_dir, epochs=epochs, custom_hooks=[hook]))


def logged(work_dir, key="gbr/logits"):
    return {line["step"]: line[key] for line in scalars(work_dir) if key in line}


def stored(work_dir, num_samples=48):
    return json.loads(Path(work_dir, f"gbr_samples_{num_samples}_seed0.json").read_text())["indices"]


def literal_gbr(cfg, checkpoint, indices, pixel=False):
    """Per-sample squared norms by the definition, of pictures taken from scikit-learn's digits by hand."""
    model = get_model(cfg, pretrained=str(checkpoint) if checkpoint else None).double()
    prep = model.data_preprocessor
    dataset = Digits(split="train", pipeline=PACK)
    norms = []
    for index in indices:
        pixels = dataset[index]["inputs"].double()[None]
        x = (pixels - prep.mean) / prep.std
        forward = (lambda p: model((p - prep.mean) / prep.std)) if pixel else model
        jacobian = torch.autograd.functional.jacobian(lambda v, f=forward: f(v)[0], pixels if pixel else x)
        norms.append(jacobian.square().sum())
    return torch.stack(norms)


@pytest.fixture(scope="module")
def exact_run(tmp_path_factory):
    torch.set_num_threads(1)  # runs before the fixture that does this for each test
    work_dir = tmp_path_factory.mktemp("exact")
    return run(work_dir, projections=None), work_dir


def test_logged_values_are_the_mean_literal_jacobian_norm_of_the_checkpoints(exact_run):
    runner, work_dir = exact_run
    values, errors = logged(work_dir), logged(work_dir, "gbr/logits_sem")
    assert list(values) == [0, 1, 2]
    for epoch in (1, 2):
        norms = literal_gbr(runner.cfg, work_dir / f"epoch_{epoch}.pth", stored(work_dir))
        assert values[epoch] == pytest.approx(norms.mean().item(), rel=1e-4)
        assert errors[epoch] == pytest.approx(norms.std().item() / math.sqrt(48), rel=1e-3)
    assert all(seconds > 0 for seconds in logged(work_dir, "gbr/seconds").values())


def test_values_are_the_same_under_mmengines_activation_checkpointing(exact_run, tmp_path):
    _, exact_dir = exact_run
    hook = dict(type="GBRHook", num_samples=48, batch_size=16, projections=None)
    train(digits_config(tmp_path, custom_hooks=[hook], activation_checkpointing=["backbone.layer2"]))
    assert logged(tmp_path)[0] == pytest.approx(logged(exact_dir)[0], rel=1e-5)
    assert math.isfinite(logged(tmp_path)[1])


def test_pixel_space_probs_and_the_label_are_other_functions_of_the_same_samples(exact_run, tmp_path):
    runner, exact_dir = exact_run
    hooks = [
        dict(type="GBRHook", num_samples=48, batch_size=48, projections=None, space="pixel"),
        dict(type="GBRHook", num_samples=48, batch_size=48, projections=None, output="probs"),
        dict(type="GBRHook", num_samples=48, batch_size=48, projections=1, output="label_prob"),
    ]
    train(digits_config(tmp_path, epochs=1, custom_hooks=hooks))
    assert stored(tmp_path) == stored(exact_dir)
    in_pixels, normalized = logged(tmp_path), logged(exact_dir)
    std = runner.model.data_preprocessor.std[0].item()  # one for all channels
    for epoch in (0, 1):
        assert in_pixels[epoch] == pytest.approx(normalized[epoch] / std**2, rel=1e-4)
    assert 0 < logged(tmp_path, "gbr/label_prob")[1] < logged(tmp_path, "gbr/probs")[1]


def test_one_projection_agrees_with_exact_within_its_standard_error(exact_run, tmp_path):
    _, exact_dir = exact_run
    run(tmp_path, projections=1)
    values, errors = logged(tmp_path), logged(tmp_path, "gbr/logits_sem")
    for epoch, exact in logged(exact_dir).items():
        assert abs(values[epoch] - exact) < 4 * errors[epoch]
        assert values[epoch] != exact


def test_a_resumed_run_goes_on_with_the_stored_samples(tmp_path):
    run(tmp_path, epochs=1)
    path = tmp_path / "gbr_samples_48_seed0.json"
    record = json.loads(path.read_text())
    record["indices"] = list(range(100, 148))  # what another version might have chosen
    path.write_text(json.dumps(record))
    next(tmp_path.glob("*/vis_data/scalars.json")).unlink()  # a run of the same second would go on in it
    cfg = digits_config(tmp_path, epochs=2, resume=True, custom_hooks=[dict(type="GBRHook", num_samples=48)])
    runner = build_runner(cfg)
    runner.train()
    hook = next(h for h in runner.hooks if isinstance(h, GBRHook))
    assert sum(hook._samples.batches, []) == list(range(100, 148))
    (latest,) = (log.read_text().splitlines() for log in tmp_path.glob("*/vis_data/scalars.json"))
    # Epoch 1 comes again with its validation: the first run might have stopped before it had measured.
    assert [r["step"] for r in map(json.loads, latest) if "gbr/logits" in r] == [1, 2]


def test_iterations_can_be_counted_in_place_of_epochs(tmp_path):
    run(tmp_path / "by_iter", epochs=2, interval=4, by_epoch=False)
    assert list(logged(tmp_path / "by_iter")) == [0, 4, 6]  # three iterations an epoch; the last is always measured
    cfg = digits_config(tmp_path / "loop", custom_hooks=[dict(type="GBRHook", num_samples=48, interval=2)])
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=5, val_interval=5)
    cfg.log_processor = dict(by_epoch=False)
    cfg.param_scheduler = None
    train(cfg)
    assert list(logged(tmp_path / "loop")) == [0, 2, 4, 5]


@HOOKS.register_module(force=True)
class _Diverge(Hook):
    """Weights that hold NaN from the second epoch on."""

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            nn.init.constant_(runner.model.head.fc.weight, math.nan)


def test_nan_is_logged_with_a_warning_and_training_goes_on(tmp_path):
    hooks = [dict(type="_Diverge"), dict(type="GBRHook", num_samples=8)]
    cfg = digits_config(tmp_path, "resnet8_1xb64", epochs=3, custom_hooks=hooks, default_hooks__enc_guard=None)
    runner = train(cfg)
    values = logged(tmp_path)
    assert math.isfinite(values[1])
    assert math.isnan(values[2])
    assert math.isnan(values[3])
    assert runner.epoch == 3
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert log.count("GBR: 8 of 8 samples have a value that is NaN or infinite at epoch") == 2


@pytest.mark.timeout(600)
def test_one_and_three_processes_log_the_same_values(exact_run, tmp_path):
    """Measured on a trained checkpoint before the first step, so that all have the same weights."""
    _, exact_dir = exact_run
    values = {}
    for processes in (1, 3):
        work_dir = tmp_path / str(processes)
        hooks = [
            dict(type="GBRHook", num_samples=48, batch_size=10, projections=None),
            dict(type="GBRHook", num_samples=48, batch_size=10, projections=1, output="probs"),
        ]
        load_from = str(exact_dir / "epoch_2.pth")
        cfg = digits_config(work_dir, custom_hooks=hooks, load_from=load_from, train_dataloader__batch_size=16)
        cfg.default_hooks.logger.interval = 1
        if processes == 3:  # a run less: the loss term trains on several processes as well
            cfg.model.gbr_penalty = dict(weight=1e-4)
        if processes == 1:
            train(cfg)
        else:
            train_on_processes(cfg, processes)
        keys = ("gbr/logits", "gbr/logits_sem", "gbr/probs", "gbr/probs_sem")
        values[processes] = [logged(work_dir, key)[0] for key in keys]
        assert math.isfinite(logged(work_dir)[1])
        assert any("loss_gbr" in line for line in scalars(work_dir)) == (processes == 3)
    assert values[1][0] == pytest.approx(logged(exact_dir)[2], rel=1e-5)
    assert values[3] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_samples", 1),
        ("batch_size", 0),
        ("projections", 0),
        ("output", "loss"),
        ("space", "lab"),
        ("interval", 0),
        ("name", "a b"),
        ("name", "seconds"),
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=option):
        GBRHook(**{option: value})
