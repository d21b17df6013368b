"""Runs that train side by side: they give the runner's results, in the grid's order, within their time, once."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys

import pytest
import torch
from helpers import ROOT

from lab.side_by_side import train_in_turns
from lab.side_by_side.training import Training
from lab.study import execute, load_grid, pending
from lab.study import results as metrics
from lab.study.results import load_results

CPU = torch.device("cpu")

# Two batches an epoch, the second one smaller. The second cell draws all that can be drawn for a picture and a batch.
TINY = """
arenas = dict(digits=dict(title="digits", config="lab/study/digits_resnet8.py", images=100, epochs=4, overrides={
    "train_dataloader.dataset.indices": 100, "val_dataloader.dataset.indices": 64,
    "train_cfg": dict(max_epochs=4, val_interval=2), "param_scheduler.milestones": [1]},
    pgd=dict(eps=[8], steps=10)))
pipeline = [
    dict(type="RandomCrop", crop_size=8, padding=1), dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="Cutout", shape=4, pad_val=(114, 123, 125), prob=1.0), dict(type="PackInputs")]
cells = dict(digits={
    "mixup": dict(title="Mixup", seeds=[0, 1], overrides={
        "model.train_cfg": dict(augments=dict(type="Mixup", alpha=0.2))}),
    "all": dict(title="ENC and all augmentations", seeds=[2], overrides={
        "model.type": "ENCImageClassifier", "train_dataloader.dataset.pipeline": pipeline,
        "model.train_cfg": dict(augments=dict(type="CutMix", alpha=1.0)),
        "model.head.loss": dict(type="LabelSmoothLoss", label_smooth_val=0.1)}),
    "retracted": dict(title="ENC, retracted", seeds=[0], overrides={
        "model.type": "ENCImageClassifier", "model.enc": dict(how="project"),
        "optim_wrapper.paramwise_cfg": dict(projection="retract")}),
    "wild": dict(title="wild", seeds=[0], overrides={"optim_wrapper.optimizer.lr": 1e30}),
    "broken": dict(title="broken", seeds=[0], overrides={"model.head.in_channels": 7}),
})
"""


@pytest.fixture(scope="module")
def done(grid, tmp_path_factory):
    """The tiny grid, two runs at a time: the study's folder, and the order in which runs ended."""
    folder, lines = tmp_path_factory.mktemp("study"), []
    left = train_in_turns(load_grid(grid).runs(), folder / "runs", CPU, abreast=2, root=ROOT, say=lines.append)
    assert left == []
    return folder, [line.split(":")[0] for line in lines]


def result_of(folder, run_id):
    return json.loads((folder / "runs" / f"{run_id}.json").read_text())


@pytest.mark.parametrize(
    "run_id",
    [pytest.param("digits/mixup-seed0", marks=pytest.mark.slow), "digits/all-seed2", "digits/retracted-seed0"],
)
def test_a_run_among_others_has_the_numbers_of_the_runner_alone(done, grid, tmp_path, run_id):
    (run,) = (run for run in load_grid(grid).runs() if run.id == run_id)
    execute(run, tmp_path / "runs", tmp_path / "work", ROOT)
    want, found = result_of(tmp_path, run_id), result_of(done[0], run_id)
    # The runner's loss is the mean over its log's last window, here it is the epoch's.
    windowed, whole = (result["by_epoch"].pop("loss") for result in (want, found))
    assert windowed[0] == whole[0]
    assert found["by_epoch"] == want["by_epoch"]
    assert found["final"].items() <= want["final"].items()
    assert {key for key in want["final"] if not re.search("averaged|_low|_high|_median", key)} == set(found["final"])


def test_runs_that_share_their_numbers_leave_them_as_they_are(grid):
    (run,) = (run for run in load_grid(grid).runs() if run.id == "digits/mixup-seed1")

    def losses():
        training, found = Training(run, ROOT, CPU), []
        for _ in range(training.epochs):
            training.begin_epoch()
            for number in range(len(training.sizes)):
                training.step(number)
            found.append(training.end_epoch())
        return found

    assert losses() == losses()


def test_a_result_is_one_that_the_study_reads(done, grid):
    folder, _ = done
    found = load_results(load_grid(grid), folder / "runs")
    measured = [value for value in vars(metrics).values() if isinstance(value, metrics.Metric)]
    result = found.runs["digits/all-seed2"]
    # What is shared has no time of its own, and the margin of a hardly trained network can be negative.
    assert {m for m in measured if m.read(result) is None} - {metrics.GBR_MARGIN} == {
        metrics.STEP_SECONDS,
        metrics.CPU_SECONDS,
    }
    assert result["side_by_side"] == 2
    assert set(result["provenance"]) >= {"commit", "versions", "processor"}
    assert found.missing == []


def test_faults_of_single_runs_are_results_and_stop_no_other(done):
    folder, _ = done
    wild, broken = (result_of(folder, f"digits/{name}-seed0") for name in ("wild", "broken"))
    assert (wild["status"], broken["status"]) == ("diverged", "failed")
    assert "NaN or infinite" in wild["error"]
    assert "RuntimeError" in broken["error"]
    assert "Traceback" in broken["traceback"]


FIRST = ("mixup-seed0", "all-seed2", "retracted-seed0", "wild-seed0", "broken-seed0")


def test_the_first_seeds_of_all_cells_end_before_second_ones(done):
    order = done[1]
    assert order[-1] == "digits/mixup-seed1"
    assert set(order[:-1]) == {f"digits/{name}" for name in FIRST}


def test_no_run_starts_or_leaves_a_result_when_the_time_is_up(grid, tmp_path):
    runs = load_grid(grid).runs()
    assert train_in_turns(runs, tmp_path, CPU, minutes=0, root=ROOT) == runs
    assert train_in_turns(runs, tmp_path, CPU, minutes=1e-3, root=ROOT) == runs  # the first run starts, and is too slow
    assert not list(tmp_path.iterdir())


def command(*arguments):
    """``python -m lab.side_by_side`` in this process, on the CPU: its exit status, and what it printed."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", ["lab.side_by_side", *map(str, arguments), "--device", "cpu", "--minutes", "60"])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("lab.side_by_side", run_name="__main__")
    return end.value.code or 0, output.getvalue()


def test_the_command_does_what_has_no_result_yet_and_writes_where_it_is_told(done, grid, tmp_path):
    folder, _ = done
    (folder / "runs" / "digits" / "broken-seed0.json").unlink()
    options = (grid, "--results", folder, "--only", "digits/*")
    code, printed = command(*options, "--out", tmp_path)
    assert code == 0
    assert "1 of 6 runs have no result yet; they train on cpu" in printed
    assert [path.name for path in tmp_path.glob("*/*.json")] == ["broken-seed0.json"]
    assert "0 of 6 runs" in command(*options, "--out", tmp_path)[1]
    command(*options)
    assert pending(load_grid(grid).runs(), folder / "runs") == []


@pytest.mark.slow
def test_processes_share_the_runs_and_one_that_fails_stops_no_other(done, tmp_path, capfd):
    (tmp_path / "grid.py").write_text(
        TINY + 'arenas["blocked"] = arenas["digits"]\ncells["blocked"] = {"broken": cells["digits"]["broken"]}'
    )
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "blocked").touch()  # so that there can be no such folder
    only = ("digits/mixup", "blocked/broken")  # the first process has seed 0 and the broken one, the second has seed 1
    code, printed = command(tmp_path / "grid.py", "--results", tmp_path, "--only", *only, "--processes", 2)
    assert code == 1
    assert "process 1 of 2 failed with exit status 1" in printed
    assert "1 runs are left" in printed
    assert "FileExistsError" in capfd.readouterr().err
    assert result_of(tmp_path, "digits/mixup-seed0")["side_by_side"] == 2
    for seed in range(2):
        found, alone = (result_of(folder, f"digits/mixup-seed{seed}") for folder in (tmp_path, done[0]))
        for key in ("by_epoch", "final", "status"):
            assert found[key] == alone[key]
        assert found["seconds"]["cpu"] > 0


@pytest.mark.parametrize("option", ["processes", "abreast"])
def test_numbers_below_one_are_refused(option):
    assert f"{option}: expected" in command(f"--{option}", 0)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train_dataloader.dataset.pipeline": [dict(type="ColorJitter", hue=0.1)]}, "pipeline: .*got .*ColorJitter"),
        ({"train_dataloader.dataset.pipeline": [dict(type="PackInputs")]}, "pipeline: expected RandomCrop first"),
        ({"model.train_cfg": dict(augments=dict(type="ResizeMix", alpha=1.0))}, "augments: .*got .*ResizeMix"),
        ({"default_hooks.bn_eps": dict(type="BatchNormEpsHook", eps=1e-12)}, "hooks: .* not bn_eps"),
        ({"param_scheduler": dict(type="CosineAnnealingLR", by_epoch=True)}, "param_scheduler: expected MultiStepLR"),
        ({"optim_wrapper.clip_grad": dict(max_norm=1.0)}, "optim_wrapper: .* do not know clip_grad"),
    ],
)
def test_a_config_that_would_train_in_another_way_is_refused(grid, tmp_path, overrides, message):
    text = grid.read_text().replace('"model.head.in_channels": 7', f"**{overrides!r}")
    (tmp_path / "grid.py").write_text(text)
    (run,) = load_grid(tmp_path / "grid.py").runs(["digits/broken"])
    train_in_turns([run], tmp_path / "runs", CPU, root=ROOT)
    found = result_of(tmp_path, run.id)
    assert found["status"] == "failed"
    assert re.search(message, found["error"])
