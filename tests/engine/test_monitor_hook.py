"""ENCMonitorHook against the definitions in float64."""

from __future__ import annotations

import math
import re
import statistics
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from functional.test_weights import ALL
from helpers import digits_config, scalars, train
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS

from enc_plugin import ENCLinear
from enc_plugin.convert import enc_layers
from enc_plugin.engine.efolds import config_efolds
from enc_plugin.engine.monitor_hook import STEP, ENCMonitorHook, measure_step
from enc_plugin.engine.wrappers import optim_wrappers


@HOOKS.register_module(force=True)
class _Record(Hook):
    """Keeps all ENC weights in float64 before the first and after every iteration, and the learning rates."""

    priority = "VERY_HIGH"

    def before_train(self, runner):
        self.layers = dict(enc_layers(runner.model))
        self.weights = {name: [layer.weight.detach().double().clone()] for name, layer in self.layers.items()}
        self.rates = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.rates.append(runner.optim_wrapper.get_lr()["lr"][0])
        for name, layer in self.layers.items():
            self.weights[name].append(layer.weight.detach().double().clone())


def lengths(weight: torch.Tensor, variant: str) -> torch.Tensor:
    """What the equation divides by, row by row, from its words."""
    rows = weight.reshape(1, -1) if variant in ("fro", "centered_fro") else weight.flatten(1)
    if variant in ("ws", "centered_fro"):
        rows = rows - rows.mean(1, keepdim=True)
    return rows.norm(dim=1)


def literal(before: torch.Tensor, after: torch.Tensor, variant: str, lr: float) -> dict[str, float]:
    cosine = (before * after).sum() / (before.norm() * after.norm())
    return {
        "norm": after.norm().item(),
        "angle": math.acos(min(1.0, cosine.item())),
        "effective_lr": lr / lengths(after, variant).mean().item() ** 2,
    }


def monitored(work_dir, **options):
    return [line for line in scalars(work_dir) if "enc_monitor/norm/min" in line]


@pytest.mark.parametrize(
    ("variant", "alpha", "scheduler"),
    [("ws", 1.0, True), ("wn", "learnable", False), ("fro", 2.0, False), ("centered_fro", 1.0, False)],
)
def test_scalars_are_the_definitions_on_the_weights_before_and_after_the_step(tmp_path, variant, alpha, scheduler):
    hooks = [dict(type="_Record"), dict(type="ENCMonitorHook", interval=2, per_layer=True)]
    cfg = digits_config(tmp_path, epochs=2, custom_hooks=hooks, model__enc=dict(variant=variant, alpha=alpha))
    if scheduler:  # a rate that differs at each step
        cfg.param_scheduler = dict(type="LinearLR", start_factor=0.1, end=6, by_epoch=False)
    runner = train(cfg)
    record = next(hook for hook in runner.hooks if isinstance(hook, _Record))
    lines = monitored(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert len(record.layers) == 10
    for line in lines:
        step = line["step"]
        found = {}
        for name, weights in record.weights.items():
            expected = literal(weights[step - 1], weights[step], variant, record.rates[step - 1])
            for quantity, value in expected.items():
                assert line[f"enc_monitor/{name}/{quantity}"] == pytest.approx(value, rel=1e-3), (name, quantity)
                found.setdefault(quantity, []).append(value)
            assert expected["angle"] > 1e-4
            assert line[f"enc_monitor/{name}/deviation"] < 1e-5
        for quantity, values in found.items():
            for word, summary in (("min", min), ("median", statistics.median), ("max", max)):
                assert line[f"enc_monitor/{quantity}/{word}"] == pytest.approx(summary(values), rel=1e-3)


@pytest.mark.parametrize("variant", ALL)
def test_small_and_large_angles_keep_their_digits(variant):
    """Rotations by a known angle; arccos of a float32 cosine would lose 1e-5 altogether."""
    layer = ENCLinear(64, 32, bias=False, variant=variant)
    start = layer.weight.detach().double()
    start = (start - start.mean()) / (start - start.mean()).norm()
    other = torch.randn(32, 64, dtype=torch.float64)
    other -= (other * start).sum() * start
    other /= other.norm()
    for angle in (1e-5, 1e-3, 1.0, 3.0):
        with torch.no_grad():
            layer.weight.copy_(2.5 * (1 + angle / 10) * (math.cos(angle) * start + math.sin(angle) * other))
        table = measure_step([layer], [2.5 * start.float()], [0.1])
        assert table[2].item() == pytest.approx(angle, rel=1e-2 if angle == 1e-5 else 1e-4)
        assert table[0].item() == pytest.approx(2.5 * (1 + angle / 10), rel=1e-6)


def test_the_deviation_shows_what_half_precision_rounds_and_nan_is_passed_on():
    layers = [ENCLinear(64, 32, dtype=torch.bfloat16), ENCLinear(64, 32), ENCLinear(8, 8, dtype=torch.float64)]
    before = [layer.weight.detach().clone() for layer in layers]
    norm, deviation, angle, _ = measure_step(layers, before, [0.1] * 3)
    exact = layers[0].effective_weight.double().square().sum().item()
    assert deviation[0].item() == pytest.approx(abs(exact - 1), rel=1e-6)
    assert deviation[1] < 1e-6
    assert deviation[2] < 1e-14
    assert torch.equal(angle, torch.zeros(3, dtype=torch.float64))
    torch.nn.init.constant_(layers[1].weight, math.nan)
    norm, deviation, angle, effective_lr = measure_step(layers, before, [0.1] * 3)
    for values in (norm, deviation, angle, effective_lr):
        assert values.isnan().tolist() == [False, True, False]


def test_without_per_layer_log_and_scalars_hold_summaries_alone(tmp_path):
    train(digits_config(tmp_path, epochs=2, custom_hooks=[dict(type="ENCMonitorHook", interval=3)]))
    expected = {f"enc_monitor/{q}/{s}" for q in (*STEP, "efolds") for s in ("min", "median", "max")}
    for line in monitored(tmp_path):
        assert set(line) == expected | {"step"}
    text = next(tmp_path.glob("*/*.log")).read_text()
    assert re.findall(r"ENC monitor: iteration (\d+), min / median / max", text) == ["3", "6"]
    assert text.count("enc_monitor") == 0


def test_with_accumulation_the_step_itself_is_measured(tmp_path):
    """Six iterations that step at the third and the sixth; asked for at the second, fourth and sixth."""
    hooks = [dict(type="_Record"), dict(type="ENCMonitorHook", interval=2, per_layer=True)]
    options = dict(optim_wrapper__accumulative_counts=3)
    runner = train(digits_config(tmp_path, epochs=2, custom_hooks=hooks, **options))
    record = next(hook for hook in runner.hooks if isinstance(hook, _Record))
    lines = monitored(tmp_path)
    assert [line["step"] for line in lines] == [3, 6]
    for line, (before, after) in zip(lines, ((0, 3), (3, 6)), strict=True):
        weights = record.weights["backbone.conv1"]
        expected = literal(weights[before], weights[after], "ws", 0.1)["angle"]
        assert line["enc_monitor/backbone.conv1/angle"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["resnet8_enc-ws_1xb64", "resnet8_enc-projected_1xb64", "resnet8_1xb64"])
def test_the_last_e_folds_are_those_of_the_config_with_enc_layers_a_projection_and_neither(tmp_path, name):
    options = dict(optim_wrapper__optimizer__weight_decay=0.3, custom_hooks=[dict(type="ENCMonitorHook", interval=1)])
    cfg = digits_config(tmp_path, name, epochs=2, **options)
    cfg.param_scheduler = dict(type="CosineAnnealingLR", by_epoch=False, T_max=6)  # a rate that differs at each step
    expected = config_efolds(cfg, iterations=3) if "projected" not in name else 0.0  # the projection holds the norms
    train(cfg)
    lines = [line for line in scalars(tmp_path) if "enc_monitor/efolds/median" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    values = [line["enc_monitor/efolds/median"] for line in lines]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(expected, rel=1e-12)
    assert lines[-1]["enc_monitor/efolds/min"] == lines[-1]["enc_monitor/efolds/max"] == values[-1]
    if name == "resnet8_1xb64":
        assert {key for line in lines for key in line if "/median" in key} == {"enc_monitor/efolds/median"}
        assert "this model has no ENC layers, so only e-folds" in next(tmp_path.glob("*/*.log")).read_text()


@pytest.mark.parametrize("interval", [0, -3])
def test_an_interval_below_one_is_refused(interval):
    with pytest.raises(ValueError, match=f"interval: expected at least 1, got {interval}"):
        partial(ENCMonitorHook, interval=interval)()


def test_the_wrappers_of_a_run_with_two_optimizers_are_both():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    wrappers = {name: OptimWrapper(torch.optim.SGD(part.parameters(), lr=0.1)) for name, part in model.items()}
    assert optim_wrappers(SimpleNamespace(optim_wrapper=OptimWrapperDict(**wrappers))) == list(wrappers.values())
    assert optim_wrappers(SimpleNamespace(optim_wrapper=wrappers["a"])) == [wrappers["a"]]
