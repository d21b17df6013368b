"""GBRHook and FGSMHook measure the network that validation saw, whatever hook puts its weights in and when."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import digits_config, scalars, train
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from enc_plugin import CheckpointWarning
from enc_plugin.checkpoint import read_checkpoint, which_weights
from enc_plugin.reports.gbr_report import measure_checkpoints
from enc_plugin.reports.runs import load_run
from enc_plugin.reports.summary import summary

GBR = dict(type="GBRHook", num_samples=16, projections=None)
FGSM = dict(type="FGSMHook", eps=4)


def run(work_dir: Path, hooks: list[dict], epochs: int = 2, **options):
    # A plain network: its classifier may be zero.
    cfg = digits_config(work_dir, "resnet8_1xb64", epochs=epochs, custom_hooks=hooks, **options)
    runner = train(cfg)
    cfg.dump(work_dir / "config.py")
    return runner


def logged(work_dir: Path, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in scalars(work_dir) if key in line}


def log_text(work_dir: Path) -> str:
    return "".join(path.read_text() for path in work_dir.glob("*/*.log"))


@HOOKS.register_module(force=True)
class _SilentClassifier(Hook):
    """A user's own exchange of weights: validation sees a classifier of zeros, whose logits do not move with x."""

    def before_val_epoch(self, runner):
        self.own = runner.model.head.fc.weight.detach().clone()
        runner.model.head.fc.weight.data.zero_()

    def after_val_epoch(self, runner, metrics=None):
        runner.model.head.fc.weight.data.copy_(self.own)


@pytest.mark.parametrize(
    "hooks",
    [
        [dict(type="EMAHook", momentum=0.3, priority="ABOVE_NORMAL"), GBR, FGSM],
        [FGSM, GBR, dict(type="mmpretrain.EMAHook", momentum=0.3, priority="VERY_HIGH", evaluate_on_origin=True)],
        pytest.param(
            [
                dict(type="EMAHook", ema_type="StochasticWeightAverage", update_buffers=True),
                FGSM,
                dict(GBR, priority=0),
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_accuracy_gbr_attack_and_checkpoint_are_of_one_network_under_parameter_averaging(hooks, tmp_path):
    work_dir = tmp_path / "run"
    run(work_dir, hooks, optim_wrapper__optimizer__lr=0.05)
    validated = logged(work_dir, "accuracy/top1")
    assert logged(work_dir, "fgsm/top1_clean") == pytest.approx(validated, rel=1e-6)
    gbr = logged(work_dir, "gbr/logits")
    checkpoints = [work_dir / f"epoch_{epoch}.pth" for epoch in (1, 2)]
    pairs = [(work_dir / "config.py", path) for path in checkpoints]
    for record in measure_checkpoints(pairs, num_samples=16, out=tmp_path / "gbr.json").records:
        assert record["weights"] == "averaged"
        assert gbr[record["epoch"]] == pytest.approx(record["gbr"], rel=1e-4)
    assert logged(work_dir, "gbr/averaged") == {0: 0, 1: 1, 2: 1}
    assert logged(work_dir, "fgsm/averaged") == {1: 1, 2: 1}
    head, rows = summary([load_run(work_dir)])
    assert dict(zip(head, rows[0], strict=True))["weights"] == "averaged"
    told = json.loads((work_dir / "measurements.json").read_text())
    assert told["gbr/logits"] == {
        "weights": "validated",
        "samples": "16 of 192 training samples",
        "unit": "logits² per squared standard deviation of the input",
    }
    assert told["fgsm/top1_eps4"]["samples"] == "64 validation samples"


@pytest.mark.parametrize("priority", ["HIGHEST", pytest.param("NORMAL", marks=pytest.mark.slow), "LOWEST"])
def test_a_users_own_exchange_of_weights_is_measured_where_validation_was(priority, tmp_path):
    run(
        tmp_path,
        [dict(type="_SilentClassifier", priority=priority), GBR, dict(FGSM, interval=4)],
        epochs=4,
        train_cfg__val_interval=2,
    )
    gbr = logged(tmp_path, "gbr/logits")
    # Epoch 3 had no validation, and what a validation would have seen there is not known.
    assert list(gbr) == [0, 1, 2, 4]
    assert gbr[0] > 0
    assert gbr[2] == gbr[4] == 0
    assert logged(tmp_path, "fgsm/zero_grad") == {4: 1}
    assert "GBRHook: not measured at 3, because a hook exchanges the weights for validation" in log_text(tmp_path)


@pytest.mark.parametrize(
    "averaging",
    [
        dict(type="_SilentClassifier"),
        dict(type="EMAHook", momentum=0.3),
        pytest.param(dict(type="mmpretrain.EMAHook"), marks=pytest.mark.slow),
    ],
)
def test_training_that_stops_early_ends_with_a_measurement_of_the_validated_network(averaging, tmp_path):
    stop = dict(type="EarlyStoppingHook", monitor="accuracy/top1", patience=1, min_delta=1000.0)
    runner = run(tmp_path, [averaging, dict(GBR, interval=5), dict(FGSM, interval=5), stop], epochs=6)
    assert runner.epoch == 2
    assert list(logged(tmp_path, "fgsm/top1_clean")) == [2]
    assert logged(tmp_path, "fgsm/top1_clean")[2] == pytest.approx(logged(tmp_path, "accuracy/top1")[2], rel=1e-6)
    gbr = logged(tmp_path, "gbr/logits")
    assert list(gbr) == [0, 2]
    assert (gbr[2] == 0) == (averaging["type"] == "_SilentClassifier")
    assert logged(tmp_path, "gbr/averaged")[2] == 1


def test_iterations_without_a_validation_are_measured_with_the_average_that_it_would_see(tmp_path):
    hooks = [dict(type="EMAHook", momentum=0.3), dict(GBR, interval=2), dict(FGSM, interval=3)]
    cfg = digits_config(tmp_path, custom_hooks=hooks, log_processor=dict(by_epoch=False), param_scheduler=None)
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=5, val_interval=2)
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=2)
    train(cfg)
    cfg.dump(tmp_path / "config.py")
    gbr = logged(tmp_path, "gbr/logits")
    assert list(gbr) == [0, 2, 4, 5]
    (record,) = measure_checkpoints([(tmp_path / "config.py", tmp_path / "iter_4.pth")], num_samples=16).records
    assert gbr[4] == pytest.approx(record["gbr"], rel=1e-4)
    assert list(logged(tmp_path, "fgsm/top1_clean")) == [5]


@HOOKS.register_module(force=True)
class _Forgets(Hook):
    """Puts other weights in for the validation, and never gives back what was there."""

    def before_val_epoch(self, runner):
        runner.model.head.fc.weight.data.mul_(0.5)


@pytest.mark.parametrize(
    "hooks",
    [
        pytest.param([dict(type="EMAHook", momentum=0.3)] * 2, id="wrong order"),
        pytest.param([dict(type="_Forgets")], id="never", marks=pytest.mark.slow),
    ],
)
def test_weights_that_a_validation_leaves_behind_are_warned_of(hooks, tmp_path):
    run(tmp_path, [*hooks, GBR], optim_wrapper__optimizer__lr=0.05)
    assert "GBRHook: training continues with other weights than before the validation" in log_text(tmp_path)


def test_two_hooks_of_one_name_are_refused_before_training_and_two_names_are_two_curves(tmp_path):
    pixel = dict(GBR, space="pixel")
    with pytest.raises(ValueError, match=r"same names \(gbr/logits, gbr/logits_high.*GBRHook\(name='logits_pixel'\)"):
        run(tmp_path / "refused", [GBR, pixel])
    with pytest.raises(ValueError, match=r"fgsm/top1_clean.*use one hook with all eps"):
        run(tmp_path / "refused too", [FGSM, dict(FGSM, eps=8)])
    runner = run(tmp_path / "run", [GBR, dict(pixel, name="logits_pixel")], epochs=1)
    std = runner.model.data_preprocessor.std[0].item()
    normalized, in_pixels = (logged(tmp_path / "run", f"gbr/{name}") for name in ("logits", "logits_pixel"))
    for epoch in (0, 1):
        assert in_pixels[epoch] == pytest.approx(normalized[epoch] / std**2, rel=1e-4)
    assert (
        len(logged(tmp_path / "run", "gbr/seconds")) == len(logged(tmp_path / "run", "gbr/logits_pixel_seconds")) == 2
    )
    units = json.loads((tmp_path / "run" / "measurements.json").read_text())
    assert units["gbr/logits_pixel"]["unit"] == "logits² per squared gray level, 1/255 of the pixel range"


def test_an_interval_of_epochs_is_refused_where_there_are_none(tmp_path):
    cfg = digits_config(tmp_path, custom_hooks=[dict(GBR, by_epoch=True)], log_processor=dict(by_epoch=False))
    cfg.train_cfg, cfg.param_scheduler = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=2), None
    with pytest.raises(ValueError, match="by_epoch: expected False or None"):
        train(cfg)


def test_an_eps_of_the_other_unit_is_warned_of_before_training(tmp_path):
    run(tmp_path, [dict(FGSM, eps=[8 / 255, 0.5, 1])], epochs=1)
    text = log_text(tmp_path)
    assert "FGSMHook: eps: 0.03137 is below half a grey level" in text
    assert "use eps=8" in text
    assert "eps: 0.5" not in text
    assert text.index("FGSMHook: eps") < text.index("Epoch(val)")


def test_a_checkpoint_without_an_average_holds_the_weights_in_training():
    state = {"weight": torch.ones(2)}
    assert which_weights(state, {}) == "unknown"
    assert which_weights(state, {"meta": {"epoch": 1}}) == "in training"
    assert which_weights(state, {"meta": {}, "ema_state_dict": {"module.weight": torch.ones(2)}}) == "in training"
    assert which_weights(state, {"meta": {}, "ema_state_dict": {"module.weight": torch.zeros(2)}}) == "averaged"
    assert which_weights(state, {"meta": {}, "ema_state_dict": {"module.net.weight": torch.zeros(2)}}) == "unknown"


def test_of_timms_two_networks_in_one_file_the_one_in_training_is_read_and_named(tmp_path):
    held = {"epoch": 3, "state_dict": {"weight": torch.zeros(2)}, "state_dict_ema": {"weight": torch.ones(2)}}
    torch.save(held, tmp_path / "last.pth.tar")
    with pytest.warns(CheckpointWarning, match=r"last\.pth\.tar holds .*'state_dict'.*an average.*'state_dict_ema'"):
        state, rest = read_checkpoint(tmp_path / "last.pth.tar")
    assert not state["weight"].any()
    assert which_weights(state, rest) == "in training"
