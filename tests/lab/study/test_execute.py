"""Real runs of a small grid: results, what is done again and what is not, failures, the command line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import runpy
import sys
from dataclasses import replace

import pytest
from exactness import Stopped
from helpers import ROOT

from lab.study import describe_plan, execute, load_grid, pending, read_result, run_all
from lab.study.plan import estimate

TINY = """
arenas = dict(digits=dict(title="digits", config="lab/study/digits_resnet8.py", images=128, epochs=2, overrides={
    "train_dataloader.dataset.indices": 128, "val_dataloader.dataset.indices": 64, "train_cfg.max_epochs": 2},
    pgd=dict(eps=[8], steps=2)))
cells = dict(digits={
    "plain": dict(title="plain", seeds=[0, 1]),
    "enc": dict(title="ENC", seeds=[0], overrides={"model.type": "ENCImageClassifier"}),
    "wild": dict(title="wild", seeds=[0], overrides={"optim_wrapper.optimizer.lr": 1e30}),
    "broken": dict(title="broken", seeds=[0], overrides={"model.head.in_channels": 7}),
})
"""


def study(*arguments):
    """``python -m lab.study`` in this process (its runs are processes of their own): its exit code and output."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["lab.study", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("lab.study", run_name="__main__")
    return end.value.code or 0, " ".join(output.getvalue().split())


@pytest.fixture(scope="module")
def done(grid, tmp_path_factory):
    """The tiny grid, carried out: two runs in this process, the others by the command line, two at a time."""
    folder = tmp_path_factory.mktemp("study")
    for run in load_grid(grid).runs():
        if run.id in ("digits/enc-seed0", "digits/plain-seed1"):
            execute(run, folder / "runs", folder / "work", ROOT)
    options = [grid, "--results", folder, "--work-dir", folder / "work", "--workers", 2, "--flush-denormals"]
    return folder, options, *study(*options)


def results_of(folder, run_id):
    return json.loads((folder / "runs" / f"{run_id}.json").read_text())


def test_every_run_leaves_a_result_and_a_failure_is_one(done, grid):
    folder, _, code, output = done
    assert code == 1  # one run failed
    runs = load_grid(grid).runs()
    status = {run.id: read_result(folder / "runs", run)["status"] for run in runs}
    assert status == {
        "digits/plain-seed0": "finished",
        "digits/enc-seed0": "finished",
        "digits/wild-seed0": "diverged",
        "digits/broken-seed0": "failed",
        "digits/plain-seed1": "finished",
    }
    broken = results_of(folder, "digits/broken-seed0")
    assert "RuntimeError" in broken["error"]
    assert "Traceback" in broken["traceback"]
    assert "digits/broken-seed0: failed" in output


def test_a_run_that_diverges_is_no_failure(done):
    folder, _, _, output = done
    wild = results_of(folder, "digits/wild-seed0")
    assert "NaN or infinite in epoch 1" in wild["error"]
    assert "digits/wild-seed0: diverged" in output


def test_a_result_says_what_was_run_and_measured(done):
    found = results_of(done[0], "digits/enc-seed0")
    assert found["overrides"]["model.type"] == "ENCImageClassifier"
    assert found["overrides"]["randomness"] == {"seed": 0}
    assert set(found["provenance"]) == {"commit", "python", "versions", "processor", "threads", "denormals"}
    assert [epoch for epoch, _ in found["by_epoch"]["accuracy/top1"]] == [1, 2]
    assert [epoch for epoch, _ in found["by_epoch"]["gbr/logits"]] == [0, 1, 2]
    final = found["final"]
    # Two ways to the same number: the runner's evaluator, and the study's own pass over the test set.
    assert final["test_top1"] == pytest.approx(final["top1"], abs=1e-4)
    assert final["fgsm/top1_clean"] == pytest.approx(final["top1"], abs=1e-4)
    assert final["test_samples"] == 64
    assert final["train_samples"] == 128
    assert final["norms"]["enc_max_deviation"] < 1e-5
    assert len(final["norms"]["sq_norms"]) == final["norms"]["layers"] == 10
    assert final["gbr/logits"] < math.exp(final["norms"]["residual_log_bound"])
    assert final["pgd2/top1_eps8"] <= final["fgsm/top1_eps8"] + 2
    assert (final["train_margin"] > 0) == (final["train_top1"] > 50)
    assert found["seconds"]["cpu"] > 0


def test_a_result_says_whether_denormals_were_flushed(done):
    found = [results_of(done[0], f"digits/plain-seed{seed}")["provenance"]["denormals"] for seed in (0, 1)]
    assert found == ["flushed", "kept"]  # the first was carried out by the command line


def test_other_seeds_start_from_other_weights(done):
    plain, other = (results_of(done[0], f"digits/plain-seed{seed}")["by_epoch"]["gbr/logits"][0][1] for seed in (0, 1))
    assert plain != other


def test_what_is_done_is_not_done_again(done, grid):
    folder, options, _, _ = done
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/*.json")}
    code, _ = study(*options)
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/*.json")} == before
    runs = load_grid(grid).runs()
    assert pending(runs, folder / "runs") == []
    assert [run.id for run in pending(runs, folder / "runs", retry_failed=True)] == ["digits/broken-seed0"]


def test_the_same_run_gives_the_same_result_in_another_process(done, grid, tmp_path):
    folder = done[0]
    run = next(run for run in load_grid(grid).runs() if run.id == "digits/plain-seed0")
    again = execute(run, tmp_path / "results", tmp_path / "work", ROOT)
    want = results_of(folder, run.id)
    assert json.loads((tmp_path / "results" / f"{run.id}.json").read_text())["by_epoch"] == want["by_epoch"]
    assert again["status"] == "finished"
    assert not (tmp_path / "work" / run.id).exists()


@pytest.mark.parametrize("stop", [dict(epoch=1), dict(val=2)], ids=["after an epoch", "before the last validation"])
def test_a_stopped_run_goes_on_to_the_result_of_an_unbroken_one(done, grid, tmp_path, stop):
    run = next(run for run in load_grid(grid).runs() if run.id == "digits/enc-seed0")
    hook = {"default_hooks.stop": dict(type="StopHook", **stop)}
    stopped = replace(run, cell=replace(run.cell, overrides={**run.cell.overrides, **hook}))
    with pytest.raises(Stopped):
        execute(stopped, tmp_path / "results", tmp_path / "work", ROOT)
    assert pending([run], tmp_path / "results") == [run]
    found = execute(run, tmp_path / "results", tmp_path / "work", ROOT)
    assert (found["status"], found["resumed"]) == ("finished", True)
    again = json.loads((tmp_path / "results" / f"{run.id}.json").read_text())
    want = results_of(done[0], run.id)
    assert again["by_epoch"] == want["by_epoch"]
    assert again["final"] == want["final"]


def test_dry_run_prints_the_plan_and_runs_nothing(grid, tmp_path):
    code, output = study(grid, "--results", tmp_path / "r", "--dry-run")
    assert code == 0
    assert "0 of 5 runs done" in output
    assert not (tmp_path / "r").exists()


def test_arenas_for_a_gpu_do_not_run_on_a_cpu_unless_they_are_named(tmp_path):
    plans = [study("--results", tmp_path, "--dry-run", *only)[1] for only in ([], ["--only", "g4"])]
    assert ["overfit/bn" in plan for plan in plans] == [True, False]
    assert ["g4/noise0.1" in plan for plan in plans] == [False, True]


def test_costs_come_from_the_runs_that_are_done(done, grid):
    folder = done[0]
    runs = load_grid(grid).runs()
    plain = next(run for run in runs if run.id == "digits/plain-seed1")
    seconds = [results_of(folder, f"digits/plain-seed{seed}")["seconds"]["cpu"] for seed in (0, 1)]
    assert estimate(plain, runs, folder / "runs") == pytest.approx(sum(seconds) / 2)
    assert "5 of 5 runs done; about 0.0 core hours are left" in describe_plan(runs, folder / "runs")


def test_a_process_without_a_result_is_reported(grid, tmp_path):
    runs = load_grid(grid).runs(["digits/enc"])
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    failed = run_all(runs, tmp_path / "results", lambda run: command, tmp_path / "work")
    assert [run.id for run in failed] == ["digits/enc-seed0"]
    assert pending(runs, tmp_path / "results") == runs  # to be done again


def test_runs_have_the_threads_that_were_asked_for_whatever_the_launcher_has(grid, tmp_path, monkeypatch):
    runs = load_grid(grid).runs(["digits/enc"])
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    run_all(runs, tmp_path / "results", lambda run: command, tmp_path / "work", threads=1)
    assert (tmp_path / "work" / "digits" / "enc-seed0.log").read_text() == "1\n"


def test_unknown_runs_and_grids_are_refused():
    assert study("--run", "quarter/none-seed0")[0] == "study: the grid has no run 'quarter/none-seed0'"
    assert "there is no file nowhere.py" in study("nowhere.py")[0]
