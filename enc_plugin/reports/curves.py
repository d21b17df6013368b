"""Figures of the logged scalars, drawn according to the hooks' declarations of their scalars."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

from ..engine import SCALARS
from ..engine.scalars import FigureGroup, Scalar, declared
from ..measuring.intervals import wilson_interval
from . import page, plot
from .runs import Run

TRAINING = FigureGroup("Curves", "Bands of accuracies: 95 % binomial intervals (Wilson) over the validation images.")
# Declarations of the scalars that mmengine and mmpretrain log.
_STOCK = (
    Scalar("accuracy/top1", "Validation accuracy", "top-1 accuracy (%)", TRAINING, column="top-1 (%)", form=".2f"),
    Scalar("loss", "Training loss", "loss (nats)", TRAINING),
    Scalar("lr", "Learning rate", "learning rate", TRAINING),
    *(Scalar(name, name) for name in ("memory", "<loop>/time", "<loop>/data_time")),
)
_MAIN_METRICS = 4  # most metrics to show if validation logs no accuracy
_MORE_FIGURES = 24  # most figures of undeclared scalars
_FIRST = 1.5  # most decades that a first value may add to a logarithmic axis
_PERCENT = "accuracy (%)"  # ending of the unit of scalars that are a percentage of samples


@functools.cache
def kind_of(key: str) -> Scalar | None:
    """Declaration of a logged scalar, with placeholders filled in; None if it is not declared."""
    return declared((*SCALARS, *_STOCK), key)


def keys_of(runs: Sequence[Run]) -> list[str]:
    """All keys in the order in which they were first logged."""
    return list(dict.fromkeys(key for run in runs for key in run.scalars))


def main_metrics(runs: Sequence[Run]) -> list[str]:
    """The keys of validation: top-1 accuracy, otherwise the logged metrics that no hook declares."""
    metrics = list(dict.fromkeys(key for run in runs for key in run.metrics))
    undeclared = [key for key in metrics if kind_of(key) is None]
    return ["accuracy/top1"] if "accuracy/top1" in metrics else undeclared[:_MAIN_METRICS]


def x_unit(runs: Sequence[Run]) -> str:
    """Unit of the x axes of all figures: epochs if all runs have them, else iterations."""
    return "epochs" if all(run.by_epoch for run in runs) else "iterations"


def sections(runs: Sequence[Run]) -> list[page.Html]:
    """A section for each group of declared scalars that a run logged."""
    main = {key: Scalar(key, f"Validation: {key}", key, TRAINING) for key in main_metrics(runs)}
    known = [*main, *(scalar.name for scalar in _STOCK)]
    keys = sorted(keys_of(runs), key=lambda key: known.index(key) if key in known else len(known))
    kinds = {key: kind for key in keys if (kind := kind_of(key) or main.get(key))}
    groups = dict.fromkeys([TRAINING, *(kind.group for kind in kinds.values() if kind.group)])
    return [section for group in groups for section in _section(runs, group, kinds)]


def _section(runs: Sequence[Run], group: FigureGroup, kinds: dict[str, Scalar]) -> Iterable[page.Html]:
    own = {key: kind for key, kind in kinds.items() if kind.group == group}
    if not own:
        return
    lines = [over_training(runs, key, kind) for key, kind in own.items() if not kind.against]
    words = {kind.title: kind for kind in own.values() if kind.against}
    lines += [_over_words(runs, own, kind) for kind in words.values()]
    lines += _over_layers(runs, group, kinds)
    text = [group.text] if group.text else []
    yield page.section(group.title, *text, page.grid(*lines), *_notes(runs, own))


def _notes(runs: Sequence[Run], keys: Iterable[str]) -> Iterable[page.Html]:
    """A note for each key whose unit differs between runs."""
    for key in keys:
        units = {run.measurements[key]["unit"] for run in runs if key in run.measurements}
        if len(units) > 1:
            yield page.note(f"The unit of {key} differs between runs ({'; '.join(sorted(units))}): do not compare it.")


def warnings(runs: Sequence[Run]) -> list[page.Html]:
    """A note for each scalar whose last value exceeds the limit that its hook declares."""
    kinds = {key: kind for key in keys_of(runs) if (kind := kind_of(key)) and kind.limit is not None}
    beyond = {key: [run.name for run in runs if run.last(key) > kind.limit] for key, kind in kinds.items()}
    return [page.note(f"{', '.join(beyond[key])}: {kind.beyond}") for key, kind in kinds.items() if beyond[key]]


def over_training(runs: Sequence[Run], key: str, kind: Scalar) -> page.Html:
    """The figure of a key over training."""
    scale = [run.epoch_length if run.by_epoch and x_unit(runs) == "iterations" else 1 for run in runs]
    series = [_series(run, key, kind, factor) for run, factor in zip(runs, scale, strict=True)]
    unit = x_unit(runs).removesuffix("s")
    logy = kind.log or (key == "lr" and _is_wide(runs, key))
    ylim, caption = limits_without_first(series) if logy else (None, "")
    ylabel = "\n".join([kind.unit or key, *_measured_unit(runs, key)])
    png = plot.curves(series, unit, ylabel, kind.title, whole_x=unit == "epoch", logy=logy, ylim=ylim)
    named = ", ".join(run.name for run, one in zip(runs, series, strict=True) if one is not None)
    return page.figure(png, f"{kind.title} over training, by {unit}: {named}", caption)


def more(runs: Sequence[Run]) -> list[page.Html]:
    """A collapsed section with curves over training of the scalars that have none in the other sections."""
    main = main_metrics(runs)
    plain = [key for key in keys_of(runs) if (kind := kind_of(key)) is None or kind.against]
    keys = [key for key in plain if key not in main and any(len(set(run.values(key))) > 1 for run in runs)]
    if not keys:
        return []
    kinds = {key: Scalar(key, key, getattr(kind_of(key), "unit", key)) for key in keys[:_MORE_FIGURES]}
    blocks: list[str] = [page.grid(*(over_training(runs, key, kind) for key, kind in kinds.items()))]
    if keys[_MORE_FIGURES:]:
        blocks.append(f"Not drawn: {', '.join(keys[_MORE_FIGURES:])}.")
    return [page.section("More", page.details(f"{len(kinds)} more curve{'s' * (len(kinds) > 1)}", *blocks))]


def _series(run: Run, key: str, kind: Scalar, factor: int) -> plot.Series | None:
    """The points of a key with their band; None if the run did not log it."""
    if key not in run.scalars:
        return None
    places, values = zip(*run.scalars[key], strict=True)
    x = [place * factor for place in places]
    beside = [dict(run.scalars.get(name, [])) for name in kind.band or (kind.error,)]
    if kind.band and all(beside):
        low, high = ([found.get(place, math.nan) for place in places] for found in beside)
        return plot.Series(run.name, x, values, low, high)
    errors = dict(run.scalars.get(kind.error, []))
    if errors:
        return plot.Series.with_error(run.name, x, values, [errors.get(place, math.nan) for place in places])
    return _with_share_band(run, key, kind, x, values)


def _with_share_band(run: Run, key: str, kind: Scalar, x: Sequence[float], y: Sequence[float]) -> plot.Series:
    """Points with binomial bands, if they are percentages of a known number of samples."""
    count = run.num_samples(key) if kind.unit.endswith(_PERCENT) else None
    if count is None:
        return plot.Series(run.name, x, y)
    return plot.Series(run.name, x, y, *zip(*(wilson_interval(value, count) for value in y), strict=True))


def _over_words(runs: Sequence[Run], own: dict[str, Scalar], kind: Scalar) -> page.Html:
    """Last values of scalars with a number in their name (such as eps), drawn over that number."""
    series: list[plot.Series | None] = []
    for run in runs:
        points = [
            (_number(key, one), run.last(key), key)
            for key, one in own.items()
            if key in run.scalars and one.title == kind.title
        ]
        if points:
            x, y, keys = zip(*sorted(points), strict=True)
            series.append(_with_share_band(run, keys[-1], kind, x, y))
        else:
            series.append(None)
    ylim = (0, 102) if kind.unit.endswith(_PERCENT) else None
    png = plot.curves(series, kind.against, kind.unit, kind.title, ylim=ylim)
    return page.figure(png, f"{kind.title}, against {kind.against}")


def _over_layers(runs: Sequence[Run], group: FigureGroup, kinds: dict[str, Scalar]) -> Iterable[page.Html]:
    """A figure over the layers for each quantity of the group that was logged for each layer."""
    titles = dict.fromkeys(kind.title for kind in kinds.values() if kind.group == group and kind.band)
    for title in titles:
        own = {key: kind for key, kind in kinds.items() if kind.title.startswith(f"{title}: ")}
        if own:
            values = [[run.last(key) for key in own if key in run.scalars] for run in runs]
            series = [
                plot.Series(run.name, range(1, len(y) + 1), y) if y else None
                for run, y in zip(runs, values, strict=True)
            ]
            unit = next(iter(own.values())).unit
            name = f"{title}, layer by layer"
            png = plot.curves(series, "ENC layer, from the input", unit, name, logy=True, whole_x=True)
            yield page.figure(png, name, "Last measurement.")


def _number(key: str, kind: Scalar) -> float:
    """The x value of a scalar in the figure of :func:`_over_words`."""
    if kind.at is not None:
        return kind.at
    words = next(words for scalar in SCALARS if (words := scalar.words(key)) is not None)
    return float(next(iter(words.values())))


def _measured_unit(runs: Sequence[Run], key: str) -> list[str]:
    """The unit of a measurement, if it is the same in all runs that give it."""
    units = {run.measurements[key]["unit"] for run in runs if key in run.measurements} - {"%"}
    return [f"({units.pop()})"] if len(units) == 1 else []


def _is_wide(runs: Sequence[Run], key: str) -> bool:
    values = [value for run in runs for value in run.values(key)]
    return bool(values) and min(values) > 0 and max(values) > 5 * min(values)


def limits_without_first(series: Sequence[plot.Series | None]) -> tuple[tuple[float, float] | None, str]:
    """Limits of a logarithmic axis without far-off first values, and a caption that names these values."""
    drawn = [one for one in series if one is not None]
    rest = [y for one in drawn for y in (one.y[1:] if len(one.y) > 1 else one.y) if 0 < y < math.inf]
    if not rest:
        return None, ""
    low, high = min(rest), max(rest)
    margin = 10**_FIRST
    far = {one.name: one.y[0] for one in drawn if one.y[0] > 0 and not low / margin <= one.y[0] <= high * margin}
    if not far:
        return None, ""
    return (low / 2, high * 2), f"First values beyond the axis: {', '.join(f'{k} {v:.2g}' for k, v in far.items())}."
