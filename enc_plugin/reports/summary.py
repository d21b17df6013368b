"""Summary tables of runs: results, what they were measured on, time and memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..engine import SCALARS
from ..engine.scalars import Scalar
from . import page
from .curves import keys_of, kind_of, main_metrics, x_unit
from .runs import Run

# Prefixes of the scalars of hooks that log which weights they measured. Their last value may be of another epoch than
# the last validation.
_FAMILIES = tuple({f"{scalar.name.split('/')[0]}/" for scalar in SCALARS if scalar.tells_weights})


def summary(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the summary table: one row for each run.

    A row is about one network: accuracy, GBR and FGSM are measured with the weights that validation uses. A column
    names them if those of a run are averaged. A value from another epoch than the last validation says so.
    """
    unit, columns, weights = x_unit(runs), _columns(runs), [_weights(run) for run in runs]
    is_named = "averaged" in weights
    rows = []
    for run, of_weights in zip(runs, weights, strict=True):
        rows.append(
            [
                run.name,
                run.progress + ("" if run.by_epoch or unit != "epochs" else " iterations"),
                *(_cell(run, key, kind) + _when(run, key) for key, kind in columns.items()),
                *([of_weights] if is_named else []),
                "" if math.isnan(run.seconds_per_iteration) else f"{run.seconds_per_iteration:.4f}",
            ]
        )
    titles = [kind.column for kind in columns.values()] + ["weights"] * is_named
    return ["run", unit, *titles, "s / iteration"], rows


def measured(runs: Sequence[Run]) -> list[page.Html]:
    """A table of the weights, samples and unit of each measured column; one row for all runs that agree."""
    rows = []
    for key in (key for key in _columns(runs) if key.startswith(_FAMILIES)):
        known = [run for run in runs if key in run.scalars and key in run.measurements]
        told = {run.name: tuple(run.measurements[key].get(x, "") for x in ("samples", "unit")) for run in known}
        for values in dict.fromkeys(told.values()):
            names = [name for name in told if told[name] == values]
            weights = dict.fromkeys(_weights(run) for run in known if run.name in names)
            rows.append([key, ", ".join(names), f"validated ({', '.join(weights)})", *values])
    table = page.table(["scalar", "runs", "weights", "samples", "unit"], rows)
    return [page.details("What was measured", table)] if rows else []


def _columns(runs: Sequence[Run]) -> dict[str, Scalar]:
    """Keys with a column: the main metrics of validation, then the scalars that hooks declare with a column."""
    main = {key: kind_of(key) or Scalar(key, key, column=key) for key in main_metrics(runs)}
    kinds = {key: kind for key in keys_of(runs) if (kind := kind_of(key)) and kind.column}
    return {key: kind for key, kind in (main | kinds).items() if any(key in run.scalars for run in runs)}


def _cell(run: Run, key: str, kind: Scalar) -> str:
    """The last value, with its interval or its standard error if the run has one."""
    if key not in run.scalars:
        return ""
    cell = format(run.last(key), kind.form)
    if kind.band and all(bound in run.scalars for bound in kind.band):
        return f"{cell} ({' to '.join(format(run.last(bound), '.3g') for bound in kind.band)})"
    return f"{cell} ± {run.last(kind.error):.2g}" if kind.error in run.scalars else cell


def _weights(run: Run) -> str:
    """The weights of the run's accuracy, GBR and FGSM: averaged or in training; empty if no hook logged them."""
    logged = [key for key in run.scalars if (kind := kind_of(key)) and kind.tells_weights]
    if not logged:
        return ""
    newest = max(logged, key=lambda key: run.scalars[key][-1][0])
    return "averaged" if run.last(newest) else "in training"


def _when(run: Run, key: str) -> str:
    """The epoch or iteration of a measurement, if it is not that of the last validation."""
    validated = [run.scalars[metric][-1][0] for metric in run.metrics if metric in run.scalars]
    if not key.startswith(_FAMILIES) or key not in run.scalars or not validated:
        return ""
    place = run.scalars[key][-1][0]
    return "" if place == max(validated) else f" (at {place:.4g})"


def cost(runs: Sequence[Run]) -> page.Html:
    """Time and memory of each run."""
    head = ["run", "iterations", "s / iteration (median)", "waiting for data (%)", "training (s)", "measurements (s)"]
    rows = []
    for run in runs:
        time = run.seconds_per_iteration
        waited, spent = sum(run.values("train/data_time")), sum(run.values("train/time"))
        measured = [sum(run.values(key)) for key in run.scalars if (kind := kind_of(key)) and kind.is_cost]
        memory = run.values("memory")
        rows.append(
            [
                run.name,
                str(run.iterations),
                "" if math.isnan(time) else f"{time:.4f}",
                f"{100 * waited / spent:.0f}" if spent else "",
                "" if math.isnan(time) else f"{time * run.iterations:.0f}",
                f"{sum(measured):.1f}" if measured else "",
                f"{max(memory):.0f}" if memory else "",
            ]
        )
    table = page.table(*filled([*head, "peak memory (MB)"], rows))
    text = "Training: the median time of an iteration times the number of iterations, without validation."
    return page.section("Cost", table, text)


def filled(head: Iterable[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Remove the columns that are empty in all rows."""
    head = list(head)
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return [head[i] for i in used], [[row[i] for i in used] for row in rows]
