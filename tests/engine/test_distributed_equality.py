"""One process with batches of 8 and two with batches of 4 train the same network, where no sample sees its batch."""

from __future__ import annotations

import math

import pytest
import torch
from functional.test_decay import literal as shifted
from helpers import build_runner, digits_config, scalars, train, train_on_processes

from enc_plugin import audit
from enc_plugin.convert import enc_layers
from enc_plugin.functional import enc_weight

# Batch norms keep the statistics they start with; with alpha 16 signals keep their size all the same.
UNCOUPLED = dict(model__backbone__norm_eval=True, model__enc=dict(post_norm=False, alpha=16.0))
STEPS = 20
SHIFT = 0.2
DECAY = 0.1
LR = 0.05


def config(work_dir, processes: int, **changes):
    """Twenty steps on the same 160 pictures in the same order, 8 a step."""
    return digits_config(
        work_dir,
        train_dataloader__batch_size=8 // processes,
        train_dataloader__dataset__indices=8 * STEPS,
        train_dataloader__dataset__pipeline=[dict(type="PackInputs")],  # augmentation draws differ between processes
        **UNCOUPLED
        | dict(
            optim_wrapper__optimizer=dict(_delete_=True, type="SGD", lr=LR, momentum=0.9, weight_decay=DECAY),
            optim_wrapper__paramwise_cfg=dict(shift_eps=SHIFT),
        )
        | changes,
    )


def run(work_dir, processes: int, **changes) -> dict[str, torch.Tensor]:
    """The weights after those steps."""
    cfg = config(work_dir, processes, **changes)
    train(cfg) if processes == 1 else train_on_processes(cfg, processes)
    return torch.load(work_dir / "epoch_1.pth")["state_dict"]


def measured(work_dir, processes: int):
    """The weights after those steps, and all that is logged."""
    hooks = [
        dict(type="GBRHook", num_samples=24, batch_size=8, projections=None),
        dict(type="FGSMHook", eps=[2, 8]),
        dict(type="ENCMonitorHook", interval=5, per_layer=True),
    ]
    return run(work_dir, processes, custom_hooks=hooks), logged(work_dir)


def logged(work_dir) -> dict[tuple[str, int], float]:
    prefixes = ("gbr/logits", "fgsm/", "enc_monitor/", "enc/", "accuracy/")
    return {
        (key, line["step"]): value
        for line in scalars(work_dir)
        for key, value in line.items()
        if key.startswith(prefixes) and key != "fgsm/seconds"
    }


def untrained(work_dir):
    """The network as all runs start: same seed, no step."""
    runner = build_runner(digits_config(work_dir, **UNCOUPLED))
    runner._init_model_weights()
    return runner.model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("equality")
    return [measured(directory / str(processes), processes) for processes in (1, 2)]


@pytest.mark.timeout(900)
def test_weights_after_twenty_steps_are_equal(runs, tmp_path):
    (one, _), (two, _) = runs
    model = untrained(tmp_path)
    start = model.state_dict()
    assert one.keys() == two.keys() == start.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-5 * value.abs().float().max().item(), msg=key)
    for name, layer in enc_layers(model):
        assert (one[f"{name}.weight"] - layer.weight).norm() > 0.05 * layer.weight.norm(), name
    model.load_state_dict(two)
    assert audit(model).max_deviation < 1e-5


def test_gbr_fgsm_and_monitor_log_the_same_values(runs):
    (_, one), (_, two) = runs
    assert one.keys() == two.keys()
    names = {key for key, _ in one}
    assert {"gbr/logits", "gbr/logits_sem", "fgsm/top1_eps2", "fgsm/top1_eps8", "fgsm/zero_grad"} <= names
    assert {"enc_monitor/head.fc/angle", "enc_monitor/effective_lr/median", "accuracy/top1"} <= names
    assert [step for key, step in one if key == "gbr/logits"] == [0, 1]
    assert [step for key, step in one if key == "enc_monitor/norm/max"] == [5, 10, 15, 20]
    for key, value in one.items():
        # Deviations are nothing but rounding; an angle is the small difference of weights that agree to 1e-5.
        rounding = 1e-6 if "deviation" in key[0] else 1e-5 if "/angle" in key[0] else 0.0
        assert two[key] == pytest.approx(value, rel=1e-4, abs=rounding), key
        assert math.isfinite(value)


@pytest.mark.timeout(900)
def test_the_epsilon_shift_alone_is_the_same_and_the_formulas(tmp_path):
    """Gradients clipped away: what twenty steps with momentum leave is the shifted decay."""
    clip = dict(optim_wrapper__clip_grad=dict(max_norm=1e-12))
    results = [run(tmp_path / str(processes), processes, **clip) for processes in (1, 2)]
    model = untrained(tmp_path / "start")
    for name, layer in enc_layers(model):
        with_shift, without = (decayed(layer.weight.detach().double(), shift) for shift in (SHIFT, 0.0))
        one, two = (result[f"{name}.weight"].double() for result in results)
        assert torch.equal(one, two), name
        torch.testing.assert_close(one, with_shift, rtol=0, atol=1e-5 * with_shift.abs().max().item())
        assert (with_shift - without).abs().max() > 0.05 * with_shift.abs().max(), name


@pytest.mark.timeout(900)
def test_projected_weights_are_the_same_in_both_modes(tmp_path):
    changes = dict(
        model__enc=dict(how="project", post_norm=False, alpha=16.0),
        optim_wrapper__paramwise_cfg=dict(projection="retract", custom_keys={"layer2": dict(projection="rotate")}),
    )
    found = [run(tmp_path / str(processes), processes, **changes) for processes in (1, 2)]
    model = untrained(tmp_path / "start")
    for name, layer in enc_layers(model):
        one, two = (state[f"{name}.weight"] for state in found)
        start = enc_weight(layer.weight.detach(), "ws", 16.0)
        assert one.square().sum().item() == pytest.approx(16.0, rel=1e-6), name
        assert (one - start).norm() > 2e-3 * start.norm(), name
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * one.abs().max().item(), msg=name)


def decayed(weight, shift):
    """The weight after all steps of SGD with momentum and no gradient."""
    momentum = 0.0
    for _ in range(STEPS):
        momentum = 0.9 * momentum + DECAY * shifted(weight, "ws", shift)
        weight = weight - LR * momentum
    return weight
