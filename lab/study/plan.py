"""Runs a study's pending runs side by side, each in a process of its own, and says what is left and what it costs."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from enc_plugin.table import format_table

from .execute import FAILED, core_seconds, pending, read_result
from .grid import PlannedRun

# Seconds of one core for a training image of ResNet-20, where no run of the arena has been measured yet.
_SECONDS_AN_IMAGE = 1 / 280

# Both: torch takes the number of its threads from MKL where that is set, and the launcher's own tools set it.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

# glibc returns large freed blocks to the system, so that every step faults the pages of its activations in anew. Only
# the time changes; other allocators do not read these.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def estimate(run: PlannedRun, runs: Sequence[PlannedRun], results: str | Path) -> float:
    """Core seconds that a run will take: the median of its cell's runs, else of its arena's, else a rule of thumb."""
    arena = [other for other in runs if other.cell.arena is run.cell.arena]
    for alike in ([other for other in arena if other.cell is run.cell], arena):
        found = [read_result(results, other) for other in alike]
        known = [s for r in found if r and r["status"] != FAILED and (s := core_seconds(r)) is not None]
        if known:
            return statistics.median(known)
    return run.cell.arena.images * run.cell.arena.epochs * _SECONDS_AN_IMAGE


def describe_plan(runs: Sequence[PlannedRun], results: str | Path) -> str:
    """Table of the cells with their finished and planned runs and the cost of what is left, in core hours."""
    left = {id(run) for run in pending(runs, results)}
    cells: dict[str, list[PlannedRun]] = {}
    for run in runs:
        cells.setdefault(run.cell.id, []).append(run)
    rows, total = [], 0.0
    for name, members in cells.items():
        todo = [run for run in members if id(run) in left]
        hours = sum(estimate(run, runs, results) for run in todo) / 3600
        total += hours
        done = f"{len(members) - len(todo)} of {len(members)}"
        rows.append((name, members[0].cell.title, done, f"{hours:.2f}" if todo else ""))
    table = format_table(("cell", "what", "runs done", "core hours left"), rows)
    return f"{table}\n{len(runs) - len(left)} of {len(runs)} runs done; about {total:.1f} core hours are left"


def run_all(
    runs: Sequence[PlannedRun],
    results: str | Path,
    command: Callable[[PlannedRun], Sequence[str]],
    work: str | Path,
    workers: int = 1,
    threads: int = 1,
    retry_failed: bool = False,
) -> list[PlannedRun]:
    """Carry out what has no result yet, ``workers`` at a time, with a progress display and an estimate.

    A stop (Ctrl-C) loses at most the runs that are under way: results are written as runs finish.

    Args:
        runs: The runs, in the order in which they are to be done.
        results: Folder of the results.
        command: The command that carries one run out in a process of its own and writes its result.
        work: Folder for what the processes print: ``<arena>/<cell>-seed<N>.log``.
        workers: Processes at a time.
        threads: Threads of each.
        retry_failed: Do runs again that failed.

    Returns:
        The runs that have failed.
    """
    left = pending(runs, results, retry_failed)
    costs = [estimate(run, runs, results) for run in left]
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    failed: list[PlannedRun] = []
    under_way: list[str] = []
    lock = threading.Lock()
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("study", total=len(left))
        clock = progress.add_task("core seconds", total=round(sum(costs)))

        def do(run: PlannedRun, cost: float) -> None:
            with lock:
                under_way.append(run.id)
                progress.update(bar, description=", ".join(under_way))
            log = Path(work, f"{run.id}.log")
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as stream:
                done = subprocess.run(
                    list(command(run)),
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=_KEEP_FREED_MEMORY | os.environ | dict.fromkeys(_THREADS, str(threads)),
                )
            found = read_result(results, run)
            with lock:
                under_way.remove(run.id)
                progress.update(bar, description=", ".join(under_way) or "study")
                progress.advance(bar)
                progress.advance(clock, cost)
                if found is None:
                    failed.append(run)
                    progress.print(f"{run.id}: exit code {done.returncode}, no result; see {log}")
                elif found["status"] == FAILED:
                    failed.append(run)
                    progress.print(f"{run.id}: failed: {found['error']}")
                else:
                    top1 = found.get("final", {}).get("top1")  # None where it has diverged
                    accuracy = "" if top1 is None else f" top-1 {top1:.2f} %,"
                    progress.print(f"{run.id}: {found['status']},{accuracy} {found['seconds']['cpu']:.0f} s of a core")

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(do, left, costs))
    return failed


def own_command(
    grid: str | Path, results: str | Path, work: str | Path, flush_denormals: bool = False
) -> Callable[[PlannedRun], list[str]]:
    """The command that carries out one run, to be run in the project's folder."""
    arguments = ["--results", str(results), "--work-dir", str(work)]
    arguments += ["--flush-denormals"] * flush_denormals
    return lambda run: [sys.executable, "-m", "lab.study", str(grid), *arguments, "--run", run.id]
