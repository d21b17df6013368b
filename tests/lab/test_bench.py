"""The benchmarks: sections, the text made of their results, and the figures that do not depend on the machine."""

import contextlib
import copy
import importlib
import json
import runpy
import shutil
import sys

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.nn.functional import cross_entropy

from enc_plugin import to_enc
from enc_plugin.optim import add_shift, param_groups_enc
from lab import RESULTS
from lab.bench import gpu, harness, hooks, output
from lab.bench.footprint import CallCount, footprint
from lab.bench.networks import resnet20
from lab.bench.on_gpu import rows_of
from lab.bench.rivals import CONVERSIONS, sgd
from lab.bench.training_step import step

DEPTH = 4
BENCH = RESULTS / "bench"


def network(variant: str | None) -> nn.Module:
    layers = []
    for _ in range(DEPTH):
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if variant:
        to_enc(model, variant)
    return model.train()


@pytest.fixture
def bench(monkeypatch, capsys):
    """``python -m lab.bench`` in this process; what it printed."""

    def run(*arguments, code=None):
        monkeypatch.setattr(sys, "argv", ["lab.bench", *map(str, arguments)])
        with contextlib.ExitStack() as stack:
            if code is not None:
                stack.enter_context(pytest.raises(SystemExit, check=lambda end: (end.code or 0) == code))
            runpy.run_module("lab.bench", run_name="__main__")
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


def test_every_benchmark_is_a_section_and_the_harness_is_not(bench):
    names = bench("--list", code=0).split()
    assert {"gbr_cost", "training_step", "footprint", "optimizer"} <= set(names)
    assert not {"harness", "networks", "output", "rivals"} & set(names)
    for name in names:
        assert callable(importlib.import_module(f"lab.bench.{name}").run), name


def test_an_unknown_section_is_refused_with_the_known_ones(bench):
    assert "gbr_cost" in bench("--only", "speed", code=2)


def test_charts_and_text_are_written_from_the_figures_alone(bench, tmp_path):
    for name in ("optimizer", "footprint"):
        shutil.copy(BENCH / f"{name}.json", tmp_path)
    bench("--readme", "--results", tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"optimizer.png"}  # counts have no chart
    assert "| footprint | ENC ws: memory over plain, in weights |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("section", ["fgsm", "footprint", "gbr_cost", "optimizer", "scaling"])
def test_a_section_runs_and_writes_its_figures(bench, tmp_path, section):
    bench("--only", section, "--rounds", 1, "--results", tmp_path)
    again, committed = (json.loads((folder / f"{section}.json").read_text()) for folder in (tmp_path, BENCH))
    assert again["machine"]["threads"] == 1
    assert again.keys() == committed.keys()
    assert f"## {section}" in (tmp_path / "README.md").read_text()


def test_the_committed_text_is_that_of_the_committed_figures():
    text = (BENCH / "README.md").read_text()
    assert text == output.readme(BENCH)
    for path in BENCH.glob("*.json"):
        result = json.loads(path.read_text())
        for _, rows in output.tables(result):
            for name, row in rows.items():
                assert f"| {name} | {row['seconds'] * 1e3:.1f} | {row['ratio']:.3f} [" in text
        assert not any(output.tables(result)) or path.with_suffix(".png").is_file()


def test_ratios_have_the_interval_of_order_statistics():
    times = [1.0 + 0.01 * i for i in range(15)]
    row = harness.ratios({"plain": [1.0] * 15, "slow": times[::-1]}, "plain")["slow"]
    # The 4th and the 12th of 15: P(4 <= B(15, 1/2) <= 11) = 0.965.
    assert (row["ratio_low"], row["ratio"], row["ratio_high"]) == pytest.approx((1.03, 1.07, 1.11))
    few = harness.ratios({"plain": [1.0] * 3, "slow": times[:3]}, "plain")["slow"]
    assert (few["ratio_low"], few["ratio_high"]) == (few["ratio_min"], few["ratio_max"]) == pytest.approx((1.0, 1.02))


def test_a_goal_holds_or_not_only_if_its_whole_interval_says_so():
    row = {"ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1}
    assert output.held(harness.goal("a", row, at_most=1.1)) == "yes"
    assert output.held(harness.goal("a", row, at_most=1.05)) == "within the noise"
    assert output.held(harness.goal("a", row, at_most=0.8)) == "**no**"
    assert output.held(harness.goal("a", row, at_most=2.0, at_least=0.95)) == "within the noise"
    assert output.held(harness.goal("a", row, at_most=2.0, at_least=1.2)) == "**no**"
    assert output.held(harness.goal("memory", 1.0, at_most=1.0)) == "yes"


# Over plain, a layer. Forward: scale and one fused op (eq. 20: scale, two norms, division, product).
@pytest.mark.parametrize(
    ("variant", "forward", "backward"), [("fro", 5, 11), ("wn", 2, 2), ("ws", 2, 1), ("centered_fro", 2, 1)]
)
def test_a_layer_adds_few_calls_and_keeps_one_weight_more_than_plain(variant, forward, backward):
    images, labels = torch.randn(2, 64, 8, 8), torch.randint(64, (2,))
    plain, enc = (footprint(network(v), images, labels) for v in (None, variant))
    assert (enc[0] - plain[0]) / DEPTH <= forward
    assert (enc[1] - plain[1]) / DEPTH <= backward
    weight, row = 4 * 64 * 64 * 9, 4 * 64
    assert enc[2] - plain[2] <= DEPTH * (weight + 4 * row)


@pytest.mark.parametrize(("variant", "calls"), [("fro", 6), ("wn", 3), ("ws", 3), ("centered_fro", 3)])
def test_the_shift_adds_few_calls_per_layer_to_the_optimizers_step(variant, calls):
    model = network(variant)
    counts = []
    for shift_eps in (0, 1e-3):
        optimizer = torch.optim.SGD(param_groups_enc(model, 1e-4, shift_eps=shift_eps), lr=0.1, momentum=0.9)
        add_shift(optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with CallCount() as counter:
            optimizer.step()
        counts.append(counter.calls)
    assert counts[0] < counts[1] <= counts[0] + DEPTH * calls


def test_the_shift_needs_no_memory_of_the_models_size():
    model = network("ws")
    optimizer = torch.optim.SGD(param_groups_enc(model, 1e-4), lr=0.1, foreach=False)
    add_shift(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    weight = 4 * 64 * 64 * 9
    assert weight <= peak < 2 * weight  # of four weights


@pytest.mark.slow
def test_every_hook_of_a_run_is_timed():
    threads = torch.get_num_threads()
    try:
        found = hooks.run(rounds=1, iterations=2, validation=250, samples=8)
    finally:
        torch.set_num_threads(threads)
    rows = found["counts"]
    assert found["step_ms"] > 0
    gbr, fgsm = rows["GBRHook, exact"], rows["FGSMHook, 4 eps"]
    assert gbr["seconds_per_epoch"] > rows["GBRHook, 1 projection"]["seconds_per_epoch"] > 0
    seconds = fgsm["ms_per_iteration"] / 1e3 + fgsm["seconds_per_epoch"] * 128 / 50_000
    assert fgsm["percent_of_an_epoch"] == pytest.approx(100 * seconds / (found["step_ms"] / 1e3))
    assert rows["ENCMonitorHook, every iteration"]["ms_per_iteration"] > 0


def test_of_a_profile_the_work_of_one_kind_of_device_is_counted():
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiled, torch.profiler.record_function("a name for a part"):
        torch.ones(3).exp()
    averages = profiled.key_averages()
    cpu, cuda = ({row.key for row in rows_of(averages, kind)} for kind in (DeviceType.CPU, DeviceType.CUDA))
    assert "aten::exp" in cpu
    assert "a name for a part" not in cpu
    assert not cuda


def test_steps_that_are_timed_are_like_all_later_ones():
    base, images, labels = resnet20(), torch.rand(2, 3, 8, 8), torch.randint(10, (2,))
    for name in ("ENC ws", "ENC fro"):
        net = CONVERSIONS[name](copy.deepcopy(base)).train()
        call, counts = step(sgd(net), lambda net=net: cross_entropy(net(images, mode="tensor"), labels)), []
        for _ in range(gpu.WARM_UP):
            with CallCount() as counter:
                call()
            counts.append(counter.calls)
        assert len({*counts[1:]}) == 1, name  # the first one makes the optimizer's state


def test_parts_of_the_section_for_a_gpu_that_no_time_is_left_for_say_so():
    *_, found = gpu.run(minutes=0, build=resnet20)
    assert all(found[part] == {"skipped": "not tried, because the time was up"} for part in gpu.PARTS)
    assert found["goals"] == []


def test_counts_that_only_some_have_leave_a_gap(tmp_path):
    counts = {"plain": {"MiB": 1.0}, "ENC": {"MiB": 2.0, "kernels": 3}}
    (tmp_path / "some.json").write_text(json.dumps({"machine": harness.machine(), "counts": counts}))
    text = output.readme(tmp_path)
    assert "| | MiB | kernels |\n|---|---|---|\n| plain | 1.00 |  |\n| ENC | 2.00 | 3.00 |" in text


@pytest.mark.slow
def test_the_section_for_a_gpu_runs_on_a_cpu_and_is_left_out_there(bench, tmp_path):
    parts = tuple(part for part in gpu.PARTS if "compiled" not in part)
    *_, found = gpu.run(rounds=1, minutes=30, batch=2, size=8, build=resnet20, parts=parts)
    tables = dict(output.tables(found))
    assert set(tables["step, bfloat16 channels last, to plain"]) == {"plain", "ENC ws", "a copy of the weight"}
    steps = tables["step, bfloat16 channels last, all networks, to plain"]
    assert {"plain", "ENC ws, layer by layer", *gpu.ENC, *gpu.RIVALS} == set(steps)
    assert not any(found[part].get("failed") for part in parts)
    assert found["step, bfloat16 channels_last, captured"] == {
        "skipped": "a step is captured on a CUDA device, not on cpu"
    }
    assert found["kernels, bfloat16 channels_last"] == {"skipped": "kernels are those of a CUDA device, not of cpu"}
    assert tables["inference, float32, batch 1"]["ENC ws, folded"]["rounds"] == 1
    assert found["counts"]["plain, float32"] == {"MiB at the peak": 0.0}
    assert [row["what"] for row in found["goals"]] == ["step, bfloat16 channels_last: ENC ws, to plain"]
    assert "gpu: skipped, because there is no CUDA device" in bench("--only", "gpu", "--results", tmp_path)
    assert not (tmp_path / "gpu.json").exists()
