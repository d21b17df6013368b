"""Training runs: all scalars that mmengine logged in a work dir, with resumed segments joined."""

from __future__ import annotations

from ..installation import needs_mmengine  # noqa: F401

# isort: split
import contextlib
import functools
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config

from ..build import build_dataset, load_config, named_parts
from ..engine import SCALARS
from ..engine.scalars import declared, read_measurements
from .run_log import read_origin
from .segments import Segment, counts_epochs, newest_start, read_segment, validates


@dataclass
class Run:
    """One run: its name, config, and each scalar as a list of (epoch or iteration, value).

    Attributes:
        name: Name of the run in a report.
        config: Config of the newest segment; empty if there is none.
        scalars: Points of each key, ascending in x. Training losses have fractions of epochs as x. The keys ``time``
            and ``data_time`` (seconds per iteration) become ``train/...`` and ``val/...``.
        by_epoch: Whether x counts epochs (else iterations).
        iterations: Number of trained iterations, as far as they were logged.
        epoch_length: Iterations per epoch, estimated from the log; 0 if unknown.
        metrics: Keys that validation logged.
        notes: Remarks for the reader: resumed, left out, not finite, not read.
        work_dir: Folder of the run.
        log: The ``scalars.json`` of the newest segment.
        measurements: For each scalar that a hook of this plugin measured, its ``weights``, ``samples`` and ``unit``.
        origin: Origin of the run, see :func:`enc_plugin.reports.run_log.read_origin`.
        val_samples: Length of the validation set; None before it is counted.
    """

    name: str
    config: dict
    scalars: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    by_epoch: bool = True
    iterations: int = 0
    epoch_length: int = 0
    metrics: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    work_dir: Path | None = None
    log: Path | None = None
    measurements: dict[str, dict[str, str]] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    val_samples: int | None = None

    @property
    def is_enc(self) -> bool:
        """Whether the model of the config contains an ENC part."""
        return any("ENC" in name or name.startswith("enc_") for _, name in named_parts(self.config.get("model")))

    def num_samples(self, key: str) -> int | None:
        """Number of samples that a scalar was measured on; None if unknown."""
        told = re.match(r"\d+", self.measurements.get(key, {}).get("samples", ""))
        return int(told[0]) if told else self.val_samples if key in self.metrics else None

    def load_config(self) -> Config:
        """:attr:`config`, with the modules that it imports."""
        return load_config(self.log.with_name("config.py"))

    def count_validation_samples(self) -> None:
        """Set ``val_samples`` to the length of the validation set, if the set can be built."""
        with contextlib.suppress(Exception):  # a config is code, so it can raise anything
            self.val_samples = len(build_dataset(self.load_config(), "val"))

    def last(self, key: str) -> float:
        """Last value logged under ``key``; NaN if there is none."""
        return self.scalars[key][-1][1] if key in self.scalars else math.nan

    def values(self, key: str) -> list[float]:
        """All finite values under ``key``."""
        return [value for _, value in self.scalars.get(key, []) if math.isfinite(value)]

    @property
    def seconds_per_iteration(self) -> float:
        """Median of the logged training times, so that slow first iterations do not count; NaN if there is none."""
        return statistics.median(self.values("train/time") or [math.nan])

    @property
    def progress(self) -> str:
        """Number of trained epochs or iterations; with the planned number if it is not reached, such as ``5 of 8``."""
        train = self.config.get("train_cfg") or {}
        planned = train.get("max_epochs" if self.by_epoch else "max_iters")
        done = max((points[-1][0] for points in self.scalars.values()), default=0)
        return f"{done:.4g}" if not planned or done >= planned else f"{done:.4g} of {planned}"


def load_run(work_dir: str | Path, name: str | None = None) -> Run:
    """Read the run of a work dir: its newest start, with all segments that resumed it.

    Args:
        work_dir: Work dir of mmengine, with or without this plugin; the run may be in progress.
        name: Name of the run in the report; default: the name of the folder.

    Raises:
        FileNotFoundError: If the folder contains no ``scalars.json``.
    """
    work_dir = Path(work_dir)
    logs = sorted(work_dir.glob("*/vis_data/scalars.json")) or sorted(work_dir.glob("vis_data/scalars.json"))
    if not logs:
        reason = "contains no <time>/vis_data/scalars.json" if work_dir.is_dir() else "is not a folder"
        raise FileNotFoundError(
            f"work_dir: {work_dir} {reason}; pass the folder that tools/train.py wrote to "
            "(mmengine's LocalVisBackend writes that file, so the visualizer of the config must have it)"
        )
    run = Run(name or work_dir.resolve().name, {}, work_dir=work_dir)
    segments = [read_segment(path, run.notes) for path in logs]
    chain = newest_start(segments, run.notes)
    broken = sum(segment.broken for segment in chain)
    if broken:
        run.notes.append(f"{broken} damaged lines of the log were left out")
    run.config, run.log = chain[-1].config, chain[-1].file
    run.origin = read_origin(work_dir, run.log.parents[1])
    run.measurements = read_measurements(work_dir)
    training = [record for segment in chain for record in segment.training]
    if not training:
        run.notes.append("no training was logged yet")
    run.by_epoch = counts_epochs(run.config, training)
    run.iterations = training[-1]["iter"] if training else 0
    if run.by_epoch:
        # The last iteration of an epoch may not be logged, but iter <= epoch * length holds for all records.
        run.epoch_length = math.ceil(max((r["iter"] / max(r.get("epoch", 1), 1) for r in training), default=0))
    for segment in chain:
        _join(run, segment)
    if run.by_epoch:
        # The last iterations of the last epoch may not be logged either, but its validation or measurement is.
        epochs = max((int(points[-1][0]) for points in run.scalars.values()), default=0)
        run.iterations = max(run.iterations, epochs * run.epoch_length)
    for key in ("loss", *run.metrics):
        lost = next((x for x, value in run.scalars.get(key, []) if not math.isfinite(value)), None)
        if lost is not None:
            run.notes.append(f"{key} is not finite at {'epoch' if run.by_epoch else 'iteration'} {lost:.4g}")
    return run


def _join(run: Run, segment: Segment) -> None:
    """Add the scalars of a segment to a run, and drop earlier points after the iteration from which it resumed."""
    training = segment.training
    iteration = 0
    if run.scalars:  # estimate the iteration from which the segment resumed
        iteration = training[0]["iter"] - segment.log_interval if training else run.iterations
        if training:
            _forget_beyond(run, iteration, training[0].get("epoch", 1) - 1)
    found: dict[str, dict[float, float]] = {}
    epoch = max((r.get("epoch", 0) for r in training), default=math.inf)
    # Scalars that are logged without "iter", but whose "step" counts iterations.
    by_iteration = {
        key
        for record in segment.records
        for key in record
        if "iter" not in record and (_is_by_iteration(key) or record.get("step", 0) > epoch)
    }
    for record in segment.records:
        iteration = record.get("iter", iteration)
        for logged, value in record.items():
            if logged in ("step", "epoch", "iter") or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            key, x = _key(run, logged, record), record.get("step", 0)
            if "iter" in record:
                x = _training_x(run, record)
            elif not run.by_epoch:
                # LoggerHook logs validations with an epoch as step unless configured, which is 0 in an iteration loop.
                x = x or (iteration if validates(record) else 0)
            elif logged in by_iteration and run.epoch_length:
                x = x / run.epoch_length
            found.setdefault(key, {})[x] = value
    for key, points in found.items():
        run.scalars[key] = sorted((dict(run.scalars.get(key, [])) | points).items())


def _forget_beyond(run: Run, iteration: int, epochs: int) -> None:
    """Remove the points after the one from which a segment resumed."""
    start = max(iteration, epochs * run.epoch_length) / run.epoch_length if run.by_epoch else iteration
    kept = {key: [point for point in points if point[0] <= start] for key, points in run.scalars.items()}
    run.scalars = {key: points for key, points in kept.items() if points}


def _key(run: Run, key: str, record: dict) -> str:
    """Key of a scalar of a record in a run, without the loop prefix that log_with_hierarchy writes."""
    loop = "train" if "iter" in record else "val" if validates(record) else ""
    key = key.removeprefix(f"{loop}/") if loop else key
    if loop and key in ("time", "data_time"):
        return f"{loop}/{key}"
    if loop == "val" and key not in run.metrics:
        run.metrics.append(key)
    return key


@functools.cache
def _is_by_iteration(key: str) -> bool:
    """Whether a hook always logs a scalar by iteration, also in a training loop by epochs."""
    scalar = declared(SCALARS, key)
    return scalar is not None and scalar.by_iteration


def _training_x(run: Run, record: dict) -> float:
    if not run.by_epoch:
        return record["iter"]
    epoch = record.get("epoch", 1)
    # Clamped, because the epochs of a run that resumed with another batch size have two lengths.
    return min(max(record["iter"] / run.epoch_length, epoch - 1), epoch)


def default_names(work_dirs: Sequence[str | Path]) -> list[str]:
    """The names of the folders, preceded by as many parents as needed to make them different."""
    parts = [Path(work_dir).resolve().parts for work_dir in work_dirs]
    names = [Path(p[-1]).name if p else "" for p in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        double = {name for name in names if names.count(name) > 1}
        names = ["/".join(p[-depth:]) if name in double else name for p, name in zip(parts, names, strict=True)]
    return names
