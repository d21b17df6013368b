"""Declarations of the scalars that hooks log: their names and units, and how reports show them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.runner import Runner

MEASUREMENTS = "measurements.json"  # in the work dir


@dataclass(frozen=True)
class FigureGroup:
    """Section of a report with the figures of several scalars.

    Attributes:
        title: Heading of the section.
        text: Explanation of its figures.
    """

    title: str
    text: str = ""


@dataclass(frozen=True)
class Scalar:
    """A scalar that a hook logs, or a family of scalars. Each hook class lists its scalars in ``scalars``.

    In all strings, ``<word>`` is a placeholder for a part of the name without a slash, such as a layer's name.

    Attributes:
        name: Logged name, such as ``"fgsm/top1_eps<eps>"``.
        title: Heading of its figure.
        unit: Label of its axis.
        group: Section of the report with its figure; None: no figure.
        column: Heading in the summary table, which shows the last value; ``""``: not in the table.
        form: Format specification of values in the table.
        log: Whether its axis is logarithmic.
        error: Name of its standard error, drawn on both sides of the curve.
        band: Names of a lower and an upper bound, drawn as a band.
        against: Label of the x axis, if the last values are drawn over the number ``<word>`` instead of over training.
        at: x of this value in a figure over ``<word>`` of its group.
        by_iteration: Whether it is always logged by iteration, even if training counts epochs.
        is_metric: Whether it is added to the metrics of a validation, where ``save_best`` and early stopping find it.
        is_cost: Whether it is the duration of a measurement in seconds.
        tells_weights: Whether it says which weights were measured: 1 averaged, 0 in training.
        limit: If the last value is above this limit, the report shows the note ``beyond``; None: no limit.
        beyond: The note.
    """

    name: str
    title: str
    unit: str = ""
    group: FigureGroup | None = None
    column: str = ""
    form: str = ".4g"
    log: bool = False
    error: str = ""
    band: tuple[str, str] | None = None
    against: str = ""
    at: float | None = None
    by_iteration: bool = False
    is_metric: bool = False
    is_cost: bool = False
    tells_weights: bool = False
    limit: float | None = None
    beyond: str = ""

    def words(self, name: str) -> dict[str, str] | None:
        """Value of each ``<word>`` in a logged name; None if the name does not match."""
        parts = re.split(r"<(\w+)>", self.name)
        pattern = "".join(f"(?P<{p}>[^/]+)" if i % 2 else re.escape(p) for i, p in enumerate(parts))
        found = re.fullmatch(pattern, name)
        return found and found.groupdict()


def declared(scalars: Iterable[Scalar], name: str) -> Scalar | None:
    """First of ``scalars`` that matches a logged name, with its placeholders replaced; None if none matches.

    Example:
        >>> declared([Scalar("gbr/<name>", "GBR: <name>", error="gbr/<name>_sem")], "gbr/probs").error
        'gbr/probs_sem'
    """
    for scalar in scalars:
        words = scalar.words(name)
        if words is not None:
            return replace(scalar, **{f.name: _fill_in(getattr(scalar, f.name), words) for f in fields(scalar)})
    return None


def log_scalars(runner: Runner, values: dict[str, float], step: int) -> None:
    """Log values to all visualizers at ``step``, an epoch or an iteration."""
    # The message hub would repeat the values in the log of every later iteration. Only scalars.json gets them, not
    # <timestamp>.json: mmpretrain's analyze_logs.py takes each line without a learning rate for one of a validation.
    runner.visualizer.add_scalars(values, step=step)


def weights_in_words(averaged: bool) -> str:
    """Description of the measured weights, for the log."""
    return "averaged weights, as validated" if averaged else "weights in training"


def write_measurements(runner: Runner, entries: dict[str, dict[str, str]]) -> None:
    """Write weights, samples and units of scalars to ``measurements.json`` in the work dir, in the main process.

    Args:
        runner: The run.
        entries: For each scalar, descriptions with the keys ``weights``, ``samples`` and ``unit``.
    """
    if not is_main_process():
        return
    known = read_measurements(runner.work_dir)
    Path(runner.work_dir, MEASUREMENTS).write_text(json.dumps({**known, **entries}, indent=1) + "\n")


def read_measurements(work_dir: str | Path) -> dict[str, dict[str, str]]:
    """What :func:`write_measurements` has written in a work dir; empty if nothing can be read."""
    try:
        return json.loads(Path(work_dir, MEASUREMENTS).read_text())
    except (OSError, ValueError):
        return {}


def _fill_in(value: object, words: dict[str, str]) -> object:
    if isinstance(value, str):
        return re.sub(r"<(\w+)>", lambda m: words.get(m[1], m[0]), value)
    return tuple(_fill_in(part, words) for part in value) if isinstance(value, tuple) else value
