"""The results of a study, read from its JSON files, and the quantities that claims are about."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from .execute import DIVERGED, FAILED, FINISHED, core_seconds
from .grid import Grid, PlannedRun


@dataclass(frozen=True)
class Metric:
    """A quantity of a finished run.

    Attributes:
        name: With its unit, as tables and axes call it.
        read: Takes the result, returns the value; None where it was not measured or is not finite.
        digits: Format of values, such as ``'.2f'``.
        as_ratio: Whether two cells are compared by their ratio rather than their difference.
    """

    name: str
    read: Callable[[dict], float | None]
    digits: str = ".2f"
    as_ratio: bool = False


def _final(key: str) -> Callable[[dict], float | None]:
    return lambda result: result["final"].get(key)


def _norm(key: str) -> Callable[[dict], float | None]:
    return lambda result: result["final"]["norms"].get(key)


def _early_accuracy(result: dict) -> float | None:
    """Mean validation accuracy over the first half of the epochs: how fast a run converges."""
    points = result["by_epoch"].get("accuracy/top1", [])
    early = [value for epoch, value in points if epoch <= result["epochs"] / 2]
    return None if not early or None in early else sum(early) / len(early)


def _epochs_to_90(result: dict) -> float | None:
    """When validation accuracy first reaches 90 % of the final one, linear between validations."""
    points, enough = result["by_epoch"].get("accuracy/top1", []), 0.9 * result["final"]["top1"]
    if any(value is None for _, value in points):
        return None
    for i, (epoch, value) in enumerate(points):
        if value >= enough:
            before, below = points[i - 1] if i else (epoch, 0.0)
            return before + (epoch - before) * (enough - below) / (value - below)
    return None


def _gap(result: dict) -> float | None:
    final = result["final"]
    return None if None in (final["test_loss"], final["train_loss"]) else final["test_loss"] - final["train_loss"]


def _gbr_over_margin(result: dict) -> float | None:
    """Free of the scale of the logits; both of training images."""
    gbr, margin = result["final"].get("gbr/logits"), result["final"].get("train_margin")
    return gbr / margin**2 if gbr is not None and margin is not None and margin > 0 else None


def _mean_under(prefix: str) -> Callable[[dict], float | None]:
    """Mean accuracy under an attack over the eps that the arena's runs are attacked with."""

    def read(result: dict) -> float | None:
        values = [value for key, value in result["final"].items() if key.startswith(prefix)]
        return None if not values or None in values else sum(values) / len(values)

    return read


TOP1 = Metric("top-1 accuracy (%)", _final("top1"))
EARLY_TOP1 = Metric("mean top-1 accuracy over the first half of the epochs (%)", _early_accuracy)
EPOCHS_TO_90 = Metric("epochs to 90 % of the final accuracy", _epochs_to_90, ".1f")
GBR_LOGITS = Metric("GBR of the logits", _final("gbr/logits"), ".3g", as_ratio=True)
GBR_MARGIN = Metric("GBR of the logits / squared median margin", _gbr_over_margin, ".3g", as_ratio=True)
GBR_PROBS = Metric("GBR of the probabilities", _final("gbr/probs"), ".3g", as_ratio=True)
LOG_PRODUCT = Metric("log of eq. 17's product, linear maps", _norm("map_log_product"), ".1f")
RESIDUAL_BOUND = Metric("log of the residual network's bound on the GBR", _norm("residual_log_bound"), ".1f")
FREE_NORM = Metric("squared norm of all free weights", _norm("sum_sq_free"), ".4g", as_ratio=True)
GAP = Metric("test loss - training loss (nats)", _gap, ".3f")
TRAIN_LOSS = Metric("training loss (nats)", _final("train_loss"), ".3f")
FGSM = Metric("top-1 accuracy under FGSM, mean over eps (%)", _mean_under("fgsm/top1_eps"))
PGD = Metric("top-1 accuracy under PGD-10 (%)", _mean_under("pgd10/top1_eps"))
CPU_SECONDS = Metric("core seconds a run", core_seconds, ".0f", as_ratio=True)
STEP_SECONDS = Metric("seconds a step", lambda result: result["measured_seconds"].get("an_iteration"), ".3f", True)


class Results:
    """All results of a grid.

    Args:
        grid: The grid.
        runs: The results by run id.
    """

    def __init__(self, grid: Grid, runs: dict[str, dict]):
        self.grid = grid
        self.runs = runs
        self._cells: dict[tuple[str, str], list[dict]] = {}
        for result in runs.values():
            if result["status"] == FINISHED:
                self._cells.setdefault((result["arena"], result["cell"]), []).append(result)

    @property
    def arenas(self) -> list[str]:
        """The arenas that questions are answered in: none that repeats another; those for a GPU once they have runs."""
        named = self.grid.arenas.items()
        return [name for name, arena in named if not arena.repeats and (self.of_arena(name) or not arena.for_gpu)]

    def __iter__(self) -> Iterator[dict]:
        """The finished runs, in the order of the grid."""
        return iter(self.with_status(FINISHED))

    def with_status(self, status: str) -> list[dict]:
        """Results with the status ``'finished'``, ``'diverged'`` or ``'failed'``, in the order of the grid."""
        found = [self.runs[run.id] for run in self.grid.runs() if run.id in self.runs]
        return [result for result in found if result["status"] == status]

    @property
    def missing(self) -> list[PlannedRun]:
        """The planned runs that have no result."""
        return [run for run in self.grid.runs() if run.id not in self.runs]

    @property
    def unfinished(self) -> set[str]:
        """Names of the arenas that have runs to go."""
        return {run.cell.arena.name for run in self.missing}

    def of_cell(self, arena: str, cell: str) -> list[dict]:
        """The finished runs of a cell."""
        return self._cells.get((arena, cell), [])

    def of_arena(self, arena: str) -> list[dict]:
        """The finished runs of an arena, cell by cell."""
        return [run for cell in self.grid.cells.get(arena, []) for run in self.of_cell(arena, cell.name)]

    def values(self, arena: str, cell: str, metric: Metric) -> list[float]:
        """A metric of a cell's finished runs in the order of their seeds, where it is finite."""
        found = [metric.read(run) for run in sorted(self.of_cell(arena, cell), key=itemgetter("seed"))]
        return [value for value in found if value is not None]

    def title(self, arena: str, cell: str) -> str:
        """What a cell is called."""
        return next(c.title for c in self.grid.cells[arena] if c.name == cell)


def read_together(runs: Iterable[dict], *metrics: Metric) -> list[tuple[float, ...]]:
    """Values of several metrics, run by run, for the runs in which all are finite."""
    found = [tuple(metric.read(run) for metric in metrics) for run in runs]
    return [values for values in found if None not in values]


def load_results(grid: Grid, folder: str | Path) -> Results:
    """Read the results of a grid's runs.

    Args:
        grid: The grid.
        folder: Folder of ``<arena>/<cell>-seed<N>.json``.

    Raises:
        ValueError: If the folder holds a result that the grid does not plan: no run may be left out of a report.
    """
    planned = {run.id for run in grid.runs()}
    runs = {}
    for path in sorted(Path(folder).glob("*/*.json")):
        result = json.loads(path.read_text())
        if result["id"] not in planned:
            raise ValueError(
                f"results: {path} is of the run {result['id']!r}, which the grid does not plan; keep its cell in the "
                "grid, so that no run is left out, or remove the file"
            )
        if result["status"] not in (FINISHED, DIVERGED, FAILED):
            raise ValueError(f"results: {path} has the unknown status {result['status']!r}")
        runs[result["id"]] = result
    return Results(grid, runs)
