"""What the figures of a study show, as plain data, from the results alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from enc_plugin.reports import plot
from enc_plugin.reports.curves import limits_without_first

from . import results as metrics
from .claims import ENC, PLAIN, Claim
from .grid import GAUGES
from .results import Results, read_together
from .statistics import Interval, geometric_interval, interval
from .verdicts import MIN_SEEDS

# In curves. The place of a cell is its look in every figure; plain and ENC look as in reports of these two.
SHOWN = (PLAIN, ENC, "bn", "ws", "ws-bn")
GBR_AXIS = "GBR of the logits (logit² / input²)"
# Cells of no class: they differ from those of the classes in decay, learning rate, augmentation, loss or equation.
OTHERS = ("plain network, another recipe", "ENC, another recipe")


@dataclass
class Figure:
    """What a figure shows.

    Attributes:
        name: File name without ending.
        kind: ``'curves'``: series with ``label``, ``x``, ``mean``, ``low``, ``high``; ``'intervals'``: rows with
            ``label``, ``mean``, ``low``, ``high``, ``group``; ``'scatter'``: series with ``label``, ``x``, ``y`` and
            ``slot`` (number of its look).
        y_limits: Of ``'curves'``; None: as the data asks.
        data: Series or rows; None stands for curves that are not drawn, so that a cell looks the same everywhere.
        band: Of an ``'intervals'`` figure: the interval of what the rows are compared with.
    """

    name: str
    kind: str
    caption: str
    x_label: str
    y_label: str
    data: list[dict | None]
    log_x: bool = False
    log_y: bool = False
    band: tuple[float, float] | None = None
    y_limits: tuple[float, float] | None = None


def claim_curves(results: Results, claim: Claim, arena: str) -> list[Figure]:
    """The curves that belong to a claim (:attr:`Claim.curve`), of the cells :data:`SHOWN`; none if none has run."""
    title = results.grid.arenas[arena].title
    where = f"over training, {title}; bands: 95 % over three or more seeds"
    if claim.curve == "fgsm":
        return _fgsm_curves(results, arena, f"Accuracy under FGSM, {title}; bands: 95 % over three or more seeds.")
    if claim.curve == "gbr":
        caption = f"GBR of the logits {where}; 512 training images, x is the normalised image."
        return _epoch_curves(results, f"gbr_{arena}", arena, SHOWN, "gbr/logits", GBR_AXIS, caption, log_y=True)
    caption = f"Validation accuracy {where}."
    return _epoch_curves(results, f"accuracy_{arena}", arena, SHOWN, "accuracy/top1", metrics.TOP1.name, caption)


def decay_curves(results: Results, arena: str, cells: Sequence[str]) -> list[Figure]:
    """GBR over training at each decay; none if no cell has run."""
    caption = f"GBR of the logits over training at each decay, {results.grid.arenas[arena].title}."
    name = f"gbr_decay_{arena}"
    figures = _epoch_curves(results, name, arena, cells, "gbr/logits", GBR_AXIS, caption, log_y=True)
    for figure in figures:  # greys that darken with the decay; plain as everywhere
        for place, (cell, one) in enumerate(zip(cells, figure.data, strict=True)):
            if one is not None:
                one["color"] = plot.look(SHOWN.index(PLAIN))["color"] if cell == PLAIN else _grey(place / len(cells))
    return figures


def _grey(dark: float) -> str:
    """From light grey (0) to black (1), as a web colour."""
    return "#" + f"{round(190 * (1 - dark)):02x}" * 3


def _epoch_curves(
    results: Results,
    name: str,
    arena: str,
    cells: Sequence[str],
    key: str,
    y_label: str,
    caption: str,
    log_y: bool = False,
) -> list[Figure]:
    """A logged quantity over epochs: mean (geometric if log_y) and 95 % band."""
    series: list[dict | None] = []
    for cell in cells:
        by_epoch: dict[float, list[float]] = {}
        for result in results.of_cell(arena, cell):
            for epoch, value in result["by_epoch"].get(key, []):
                if value is not None and (not log_y or (epoch > 0 and value > 0)):
                    by_epoch.setdefault(epoch, []).append(value)
        series.append(_series(results.title(arena, cell), by_epoch, geometric=log_y) if by_epoch else None)
    if not any(series):
        return []
    lines = [plot.Series(one["label"], one["x"], one["mean"]) for one in series if one]
    limits, words = limits_without_first(lines) if log_y else (None, "")
    caption = f"{caption} {words}".rstrip()
    return [Figure(name, "curves", caption, "epoch", y_label, series, log_y=log_y, y_limits=limits)]


def _fgsm_curves(results: Results, arena: str, caption: str) -> list[Figure]:
    series: list[dict | None] = []
    for cell in SHOWN:
        by_eps: dict[float, list[float]] = {}
        for result in results.of_cell(arena, cell):
            for key, value in result["final"].items():
                if key.startswith("fgsm/top1_eps") and value is not None:
                    by_eps.setdefault(float(key.removeprefix("fgsm/top1_eps")), []).append(value)
        series.append(_series(results.title(arena, cell), by_eps) if by_eps else None)
    eps = "eps (1/255 of the pixel range)"
    return [Figure(f"fgsm_{arena}", "curves", caption, eps, metrics.TOP1.name, series)] if any(series) else []


def _series(label: str, values: dict[float, list[float]], geometric: bool = False) -> dict:
    """Mean and interval at each x: of positive values a geometric one, of percentages one that lies in 0 to 100.

    Fewer than :data:`lab.study.verdicts.MIN_SEEDS` values have no interval: that of two would hide all other curves.
    """
    x = sorted(values)
    bounds = []
    for at in x:
        one = _bounds(geometric_interval(values[at]) if geometric else interval(values[at]))
        if len(values[at]) < MIN_SEEDS:
            one |= {"low": None, "high": None}
        elif not geometric:
            one |= {"low": max(0.0, one["low"]), "high": min(100.0, one["high"])}
        bounds.append(one)
    return {"label": label, "x": x, **{key: [one[key] for one in bounds] for key in ("mean", "low", "high")}}


def _bounds(found: Interval) -> dict:
    low, high = (None, None) if math.isnan(found.low) else (found.low, found.high)
    return {"mean": found.mean, "low": low, "high": high}


def cells_by_class(results: Results, arena: str) -> list[Figure]:
    """Every cell, ordered by class, with the plain network's interval as a band; none if no cell has run."""
    order = {gauge: place for place, gauge in enumerate(GAUGES)}
    rows = []
    for cell in sorted(results.grid.cells[arena], key=lambda cell: order.get(cell.gauge, len(order))):
        values = results.values(arena, cell.name, metrics.TOP1)
        if values:
            group = cell.gauge or OTHERS[is_enc(cell.name)]
            rows.append({"label": cell.title, **_bounds(interval(values)), "group": group})
    if not rows:
        return []
    caption = (
        f"Top-1 accuracy of every cell, {results.grid.arenas[arena].title}: mean over seeds and 95 % interval; the "
        "band is the plain network's."
    )
    plain = results.values(arena, PLAIN, metrics.TOP1)
    band = (interval(plain).low, interval(plain).high) if len(plain) > 1 else None
    return [Figure(f"cells_{arena}", "intervals", caption, metrics.TOP1.name, "", rows, band=band)]


def is_enc(cell: str) -> bool:
    """Whether a cell of that name trains an ENC network."""
    return cell.startswith("enc")


def scatters(results: Results, arena: str) -> list[Figure]:
    """Accuracy and generalization gap of every run against its GBR; none for fewer than three runs."""
    runs = results.of_arena(arena)
    figures = []
    for metric, name in ((metrics.TOP1, "top1"), (metrics.GAP, "gap")):
        series = []
        for what, of_kind, slot in (("plain and controls", False, PLAIN), ("ENC", True, ENC)):
            points = read_together([r for r in runs if is_enc(r["cell"]) == of_kind], metrics.GBR_LOGITS, metric)
            if points:
                x, y = zip(*points, strict=True)
                series.append({"label": what, "x": list(x), "y": list(y), "slot": SHOWN.index(slot)})
        caption = f"{metric.name} against the GBR of the logits, every run, {results.grid.arenas[arena].title}."
        if sum(len(one["x"]) for one in series) >= 3:
            name = f"gbr_{name}_{arena}"
            figures.append(Figure(name, "scatter", caption, GBR_AXIS, metric.name, series, log_x=True))
    return figures
