"""What a hook logs, as the hook declares it: names, units, and how a report shows them."""

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
class Group:
    """Scalars that a report shows together.

    Attributes:
        title: Heading of the section.
        text: What a reader has to know to read its figures.
    """

    title: str
    text: str = ""


@dataclass(frozen=True)
class Scalar:
    """A scalar that a hook logs, or all scalars of one kind. A hook class lists its own in ``scalars``.

    In every text, ``<word>`` stands for a part of the name without a slash that an option or a layer fills in.

    Attributes:
        name: As it is logged, such as ``"fgsm/top1_eps<eps>"``.
        title: What it is of, the heading of its figure.
        unit: The label of its axis.
        group: With which others a report draws it; None: it has no figure of its own.
        column: Its heading in a summary table, which shows the last value; ``""``: it is not in the table.
        form: How the table writes a value, a format specification.
        log: Whether its axis is logarithmic.
        error: Name of its standard error, drawn to both sides.
        band: Names of a lower and an upper bound, drawn as a band.
        against: Label of the x axis where the last values are drawn over ``<word>``, a number, and not over training.
        at: x of this one value in the figure over ``<word>`` of its group.
        by_iteration: Whether it is logged by iteration, whatever the training loop counts.
        is_metric: Whether it joins the metrics of a validation, where ``save_best`` and early stopping find it.
        is_cost: Whether it is the seconds that a measurement took.
        tells_weights: Whether it says of which weights its hook's other scalars are: 1 averaged, 0 in training.
        limit: A value above which the report adds ``beyond`` as a note; None: there is none.
        beyond: The note.
    """

    name: str
    title: str
    unit: str = ""
    group: Group | None = None
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
        """What stands for each ``<word>`` in a logged name; None if the name is not of this kind."""
        parts = re.split(r"<(\w+)>", self.name)
        pattern = "".join(f"(?P<{p}>[^/]+)" if i % 2 else re.escape(p) for i, p in enumerate(parts))
        found = re.fullmatch(pattern, name)
        return found and found.groupdict()


def declared(scalars: Iterable[Scalar], name: str) -> Scalar | None:
    """The first of ``scalars`` that a logged name fits, with its words filled in; None if none does.

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
    """Log to all visualizers under ``step``, an epoch or an iteration."""
    # Not through the message hub: the log of every later iteration would repeat its latest values.
    runner.visualizer.add_scalars(values, step=step, file_path=f"{runner.timestamp}.json")


def weights_in_words(averaged: bool) -> str:
    """Which weights were measured, for the log."""
    return "averaged weights, as validated" if averaged else "weights in training"


def write_measurements(runner: Runner, entries: dict[str, dict[str, str]]) -> None:
    """Write into the work dir what scalars are: their weights, samples and unit. Only the main process writes.

    Args:
        runner: The run.
        entries: Of each scalar, words for each of ``weights``, ``samples`` and ``unit``.
    """
    if not is_main_process():
        return
    path = Path(runner.work_dir, MEASUREMENTS)
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    path.write_text(json.dumps({**known, **entries}, indent=1) + "\n")


def _fill_in(value: object, words: dict[str, str]) -> object:
    if isinstance(value, str):
        return re.sub(r"<(\w+)>", lambda m: words.get(m[1], m[0]), value)
    return tuple(_fill_in(part, words) for part in value) if isinstance(value, tuple) else value
