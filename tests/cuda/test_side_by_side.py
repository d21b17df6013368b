"""Runs of the study that train side by side on the device: steps are graphs, and train as those on the CPU do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmpretrain", reason="OpenMMLab is not installed")

from lab.side_by_side import train_in_turns  # noqa: E402
from lab.side_by_side.training import Training  # noqa: E402
from lab.study import load_grid  # noqa: E402

ROOT = Path(__file__).parents[2]

# 16 steps of two sizes before the learning rate changes, so that graphs of both are captured, replayed and renewed. The
# rate is small, because training magnifies rounding: here a change of all weights by 1e-6 moves no loss by 1.5e-5.
GRID = """
arenas = dict(digits=dict(title="digits", config="lab/study/digits_resnet8.py", images=100, epochs=10, overrides={
    "train_dataloader.dataset.indices": 100, "val_dataloader.dataset.indices": 64,
    "train_cfg": dict(max_epochs=10, val_interval=5), "param_scheduler.milestones": [8],
    "optim_wrapper.optimizer.lr": 1e-4}))
enc = {"model.type": "ENCImageClassifier"}
cells = dict(digits={
    "plain": dict(title="plain", seeds=[0]),
    "enc": dict(title="ENC", seeds=[0], overrides=enc),
    "cutmix": dict(title="CutMix", seeds=[0], overrides={
        **enc, "model.train_cfg": dict(augments=dict(type="CutMix", alpha=1.0)),
        "model.head.loss": dict(type="LabelSmoothLoss", label_smooth_val=0.1)}),
    **{mode: dict(title=mode, seeds=[0], overrides={
        **enc, "model.enc": dict(how="project"), "optim_wrapper.paramwise_cfg": dict(projection=mode)})
        for mode in ("retract", "rotate")},
    "noise": dict(title="noise", seeds=[0], overrides={
        "model.train_cfg": dict(augments=dict(type="GaussianNoise", std=0.1))}),
    "penalty": dict(title="GBR penalty", seeds=[0], overrides={
        "model.type": "GBRImageClassifier", "model.gbr_penalty": dict(weight=1e-3)}),
})
"""


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "grid.py").write_text(GRID)
    return {run.cell.name: run for run in load_grid(tmp_path / "grid.py").runs()}


def losses(run, device):
    training = Training(run, ROOT, device)
    found = []
    for _ in range(training.epochs):
        training.begin_epoch()
        for number in range(len(training.sizes)):
            training.step(number)
        found.append(training.end_epoch())
    return training, found


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("cell", ["plain", "enc", "retract", "rotate", "cutmix"])
def test_graphs_train_as_the_cpu_does(device, runs, cell):
    training, found = losses(runs[cell], device)
    assert len(training._graphs) == 2  # one for each size of batch, since the learning rate changed
    assert found == pytest.approx(losses(runs[cell], torch.device("cpu"))[1], rel=2e-4)


def test_all_kinds_of_runs_share_the_device_and_leave_results(device, runs, tmp_path):
    assert train_in_turns([*runs.values()], tmp_path, device, abreast=7, root=ROOT) == []
    for name in runs:
        result = json.loads((tmp_path / "digits" / f"{name}-seed0.json").read_text())
        assert result["status"] == "finished", result.get("error")
        assert result["provenance"]["gpu"]["name"]
