"""Whose turn it is: runs in the grid's order, some side by side, each result written at once, until the time is up."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.logging import MMLogger

from enc_plugin.build import pick_device

from ..children import run_together
from ..provenance import provenance
from ..study.execute import describe, outcome_of, result_path, status_of, write_result
from ..study.grid import PlannedRun
from .readings import Readings
from .training import Training


def train_in_turns(
    runs: Sequence[PlannedRun],
    out: str | Path,
    device: torch.device,
    minutes: float = math.inf,
    abreast: int = 1,
    root: str | Path = ".",
    say: Callable[[str], None] = print,
    processes: int = 1,
) -> list[PlannedRun]:
    """Train runs side by side, an epoch of each in turn, and write each result as soon as its run ends.

    Runs start in the order given. In a grid's order the seeds of all cells come in turn, so that the cells of an arena
    differ by one seed at most whenever the time ends. A run starts only if the pace so far lets it end in time.

    Args:
        runs: The runs that are to be done.
        out: Folder of the results, ``<arena>/<cell>-seed<N>.json``.
        device: Where to train.
        minutes: Time for all.
        abreast: Runs side by side.
        root: The project's folder, which configs are relative to.
        say: Gets a line for each run that ends.
        processes: How many processes share the device, each with so many runs abreast; results say so.

    Returns:
        The runs that have no result, in order.
    """
    crew = _Crew(runs, Path(out), device, abreast, Path(root), say, processes)
    deadline = time.perf_counter() + 60 * minutes
    while crew.start_runs(deadline) and time.perf_counter() < deadline:
        crew.take_turn()
    return crew.left


def train_in_processes(
    processes: int, runs: Sequence[PlannedRun], device: torch.device, minutes: float, say: Callable, **settings
) -> list[int]:
    """Share runs out to processes, each of which trains its own as :func:`train_in_turns` does, on one device.

    Of N processes, each gets every N-th run, so that the cells stay balanced. This process does not use the device.

    Args:
        processes: How many, at most one for each run.
        runs, device, minutes, say, **settings: As for :func:`train_in_turns`, in each process.

    Returns:
        Numbers of the processes that failed, counted from 1. The others have gone on.
    """
    processes = min(processes, len(runs))
    deadline = time.time() + 60 * minutes
    threads = max(1, torch.get_num_threads() // max(1, processes))
    rest = (device, deadline, threads, {**settings, "processes": processes})
    return run_together(_train_share, [(runs[k::processes], *rest) for k in range(processes)], say)


def _train_share(say, runs, device, deadline, threads, settings) -> None:
    torch.set_num_threads(threads)
    prepare_process(pick_device(device))
    train_in_turns(runs, device=device, minutes=(deadline - time.time()) / 60, say=say, **settings)


def prepare_process(device: torch.device) -> None:
    """Settings of a process that does nothing but train runs."""
    MMLogger.get_current_instance().setLevel("WARNING")  # else each network's initial weights are listed
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # sizes of pictures and batches stay the same


class _Member:
    """A run among those that train."""

    def __init__(self, run: PlannedRun):
        self.run, self.is_over = run, False
        self.start = _clocks()
        self.readings: Readings | None = None  # none before its network is built

    def begin(self, root: Path, device: torch.device) -> None:
        self.training = Training(self.run, root, device)
        self.readings = Readings(self.training)
        self.training.begin_epoch()

    def step(self, number: int) -> None:
        if number < len(self.training.sizes):
            self.training.step(number)

    def end_epoch(self) -> dict | None:
        """Measure; the final measurements after the last epoch, None before."""
        self.readings.after_epoch(self.training.end_epoch())
        if self.training.epoch == self.training.epochs:
            return self.readings.final()
        self.training.begin_epoch()
        return None


class _Crew:
    """The runs that wait, those that train, and where results go."""

    def __init__(
        self, runs: Sequence[PlannedRun], out: Path, device: torch.device, abreast: int, root: Path, say, processes
    ):
        self.waiting, self.members, self.pace = deque(runs), [], 0.0  # seconds of a turn
        self.out, self.device, self.abreast, self.root, self.say = out, device, abreast, root, say
        self.side_by_side = abreast * processes
        self.provenance = provenance(root)

    @property
    def left(self) -> list[PlannedRun]:
        return [*(member.run for member in self.members), *self.waiting]

    def start_runs(self, deadline: float) -> bool:
        """Start as many as there is place and time for; whether any train."""
        while self.waiting and len(self.members) < self.abreast:
            if time.perf_counter() + self.pace * self.waiting[0].cell.arena.epochs > deadline:
                break
            member = _Member(self.waiting.popleft())
            with self._failure_is_a_result(member):
                member.begin(self.root, self.device)
                self.members.append(member)
        return bool(self.members)

    def take_turn(self) -> None:
        """An epoch of each run, a step of each in turn, so that on a GPU their streams are busy together."""
        start = time.perf_counter()
        for number in range(max(len(member.training.sizes) for member in self.members)):
            for member in self.members:
                if not member.is_over:
                    with self._failure_is_a_result(member):
                        member.step(number)
        for member in self.members:
            if not member.is_over:
                with self._failure_is_a_result(member):
                    final = member.end_epoch()
                    if final is not None:
                        self._end(member, {"status": status_of(final), "final": final})
        self.members = [member for member in self.members if not member.is_over]
        self.pace = time.perf_counter() - start

    @contextmanager
    def _failure_is_a_result(self, member: _Member) -> Iterator[None]:
        """One run's fault is no reason to lose the others."""
        try:
            yield
        except Exception as error:
            self._end(member, outcome_of(error))

    def _end(self, member: _Member, outcome: dict) -> None:
        member.is_over = True
        wall, cpu = (now - before for now, before in zip(_clocks(), member.start, strict=True))
        result = {**describe(member.run), "provenance": self.provenance, "side_by_side": self.side_by_side}
        if member.readings is not None:
            result |= {"by_epoch": member.readings.by_epoch, "measured_seconds": member.readings.seconds}
        # The process is that of all its runs: each gets its share.
        result |= {**outcome, "seconds": {"wall": wall, "cpu": cpu / self.abreast}}
        write_result(result_path(self.out, member.run), result)
        said = f"top-1 {outcome['final']['top1']:.2f} %" if "final" in outcome else outcome["error"]
        self.say(f"{member.run.id}: {outcome['status']}, {said}, {wall:.0f} s")


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
