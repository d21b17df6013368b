"""Training runs as mmengine logged them: every scalar of a work dir, its resumed segments joined."""

from __future__ import annotations

from ..installation import needs_mmengine  # noqa: F401

# isort: split
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mmengine.config import Config

MONITOR = "enc_monitor/"  # logged by iteration whatever the training loop counts


@dataclass
class Run:
    """One run: its name, config, and every scalar as a list of (epoch or iteration, value).

    Attributes:
        name: What a report calls it.
        config: Config of its newest segment; empty if there is none.
        scalars: Points of each key, ascending; training losses lie between whole epochs. Keys ``time`` and
            ``data_time`` (seconds an iteration) are told apart as ``train/...`` and ``val/...``.
        by_epoch: Whether x counts epochs (else iterations).
        iterations: How many were trained, as far as the log tells.
        epoch_length: Iterations an epoch, as far as the log tells; 0 if it does not.
        metrics: Keys that validation logged.
        notes: What a reader should know: resumed, left out, not finite, not read.
        work_dir: Where it was read.
        measurements: Of each scalar that a hook of this plugin measured, its ``weights``, ``samples`` and ``unit``.
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
    measurements: dict[str, dict[str, str]] = field(default_factory=dict)

    def last(self, key: str) -> float:
        """Last value logged under ``key``; NaN if there is none."""
        return self.scalars[key][-1][1] if key in self.scalars else math.nan

    def values(self, key: str) -> list[float]:
        """All finite values under ``key``."""
        return [value for _, value in self.scalars.get(key, []) if math.isfinite(value)]

    @property
    def seconds_per_iteration(self) -> float:
        """Median of the logged training times, which the slow first iterations do not move; NaN if there is none."""
        return statistics.median(self.values("train/time") or [math.nan])

    @property
    def progress(self) -> str:
        """Epochs or iterations trained, and those planned where there is more to come, such as ``5 of 8``."""
        train = self.config.get("train_cfg") or {}
        planned = train.get("max_epochs" if self.by_epoch else "max_iters")
        done = max((points[-1][0] for points in self.scalars.values()), default=0)
        return f"{done:.4g}" if not planned or done >= planned else f"{done:.4g} of {planned}"


@dataclass
class _Segment:
    """What one process wrote between its start and its end."""

    config: dict
    records: list[dict]
    broken: int

    @cached_property
    def training(self) -> list[dict]:
        return [record for record in self.records if "iter" in record]

    @property
    def makes_up(self) -> bool:
        """Whether it resumed and has trained nothing, but made up for the validation that was still due."""
        validated = any("time" in record or "val/time" in record for record in self.records)
        return validated and not self.training and bool(self.config.get("resume"))

    @property
    def log_interval(self) -> int:
        return ((self.config.get("default_hooks") or {}).get("logger") or {}).get("interval", 10)


def load_run(work_dir: str | Path, name: str | None = None) -> Run:
    """Read the run of a work dir: its newest start, with all segments that resumed it.

    Args:
        work_dir: Folder that mmengine trained in, by epochs or by iterations, with or without this plugin; the run may
            be in progress.
        name: What the report calls the run; default: the folder's name.

    Raises:
        FileNotFoundError: If the folder holds no ``scalars.json``.
    """
    work_dir = Path(work_dir)
    logs = sorted(work_dir.glob("*/vis_data/scalars.json")) or sorted(work_dir.glob("vis_data/scalars.json"))
    if not logs:
        reason = "holds no <time>/vis_data/scalars.json" if work_dir.is_dir() else "is no folder"
        raise FileNotFoundError(
            f"work_dir: {work_dir} {reason}; give the folder that tools/train.py wrote to "
            "(mmengine's LocalVisBackend writes that file, so the config's visualizer needs it)"
        )
    run = Run(name or work_dir.resolve().name, {}, work_dir=work_dir)
    segments = [_read_segment(path, run.notes) for path in logs]
    chain = _current(segments, run.notes)
    broken = sum(segment.broken for segment in chain)
    if broken:
        run.notes.append(f"{broken} damaged lines of the log were left out")
    run.config = chain[-1].config
    run.measurements = _read_measurements(work_dir)
    training = [record for segment in chain for record in segment.training]
    if not training:
        run.notes.append("nothing of its training is logged yet")
    run.by_epoch = _by_epoch(run.config, training)
    run.iterations = training[-1]["iter"] if training else 0
    if run.by_epoch:
        # The last iteration of an epoch need not be logged: iter <= epoch * length for all, and lengths are whole.
        run.epoch_length = math.ceil(max((r["iter"] / max(r.get("epoch", 1), 1) for r in training), default=0))
    for segment in chain:
        _join(run, segment)
    if run.by_epoch:
        # Nor need the last iteration of the last epoch be, but its validation or measurement is.
        epochs = max((int(points[-1][0]) for points in run.scalars.values()), default=0)
        run.iterations = max(run.iterations, epochs * run.epoch_length)
    for key in ("loss", *run.metrics):
        lost = next((x for x, value in run.scalars.get(key, []) if not math.isfinite(value)), None)
        if lost is not None:
            run.notes.append(f"{key} is not finite at {'epoch' if run.by_epoch else 'iteration'} {lost:.4g}")
    return run


def default_names(work_dirs: Sequence[str | Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [Path(work_dir).resolve().parts for work_dir in work_dirs]
    names = [Path(p[-1]).name if p else "" for p in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        double = {name for name in names if names.count(name) > 1}
        names = ["/".join(p[-depth:]) if name in double else name for p, name in zip(parts, names, strict=True)]
    return names


def _read_segment(path: Path, notes: list[str]) -> _Segment:
    config, file = {}, path.with_name("config.py")
    try:
        if file.is_file():
            config = Config.fromfile(file, import_custom_modules=False).to_dict()
    except Exception as error:  # a config is code: anything can go wrong in it
        notes.append(f"{file.name} could not be read ({type(error).__name__}: {error})")
    records, broken = [], 0
    # A run in progress may have written half of its last line.
    for line in path.read_text(errors="replace").split("\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if isinstance(record, dict):
            records.append(record)
    return _Segment(config, records, broken)


def _read_measurements(work_dir: Path) -> dict[str, dict[str, str]]:
    try:
        return json.loads((work_dir / "measurements.json").read_text())
    except (OSError, ValueError):
        return {}


def _current(segments: list[_Segment], notes: list[str]) -> list[_Segment]:
    """The newest start in the folder and what resumed it."""
    chain: list[_Segment] = []
    left_out = 0
    for segment in segments:
        if not segment.training:
            if chain and segment.makes_up:
                chain.append(segment)
            continue
        begins = chain and segment.training[0]["iter"] <= chain[0].training[0]["iter"]
        if chain and (begins or not segment.config.get("resume", True)):
            left_out += len(chain)
            chain = []
        chain.append(segment)
    if len(chain) > 1:
        notes.append("resumed " + ("once" if len(chain) == 2 else f"{len(chain) - 1} times"))
    if left_out:
        notes.append(f"{left_out} earlier start{'s' * (left_out > 1)} in the same folder left out")
    return chain or segments[-1:]


def _by_epoch(config: dict, training: list[dict]) -> bool:
    train = config.get("train_cfg") or {}
    if "by_epoch" in train:
        return bool(train["by_epoch"])
    if "type" in train:
        return "Iter" not in str(train["type"])
    return any("epoch" in record for record in training) or not training


def _join(run: Run, segment: _Segment) -> None:
    """Add a segment's scalars, in place of what an earlier one logged beyond the point from which it resumed."""
    training = segment.training
    iteration = 0
    if run.scalars:  # from where it resumed, as far as the log tells
        iteration = training[0]["iter"] - segment.log_interval if training else run.iterations
    if run.scalars and training:
        start = iteration
        if run.by_epoch:
            start = max(start, (training[0].get("epoch", 1) - 1) * run.epoch_length) / run.epoch_length
        kept = {key: [p for p in points if p[0] <= start] for key, points in run.scalars.items()}
        run.scalars = {key: points for key, points in kept.items() if points}

    found: dict[str, dict[float, float]] = {}
    epoch = max((r.get("epoch", 0) for r in training), default=math.inf)
    by_iteration = {
        key
        for record in segment.records
        for key in record
        if "iter" not in record and (key.startswith(MONITOR) or record.get("step", 0) > epoch)
    }
    for record in segment.records:
        if "iter" in record:
            iteration = record["iter"]
        for key, value in record.items():
            if key in ("step", "epoch", "iter") or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            x = record.get("step", 0)
            if "iter" in record:
                x = _training_x(run, record)
                key = key.removeprefix("train/")  # log_with_hierarchy writes it
                key = f"train/{key}" if key in ("time", "data_time") else key
            elif not run.by_epoch:
                # LoggerHook counts validations in epochs, of which such a loop has none, unless it is told not to.
                x = x or (iteration if "time" in record or "val/time" in record else 0)
            elif key in by_iteration and run.epoch_length:
                x = x / run.epoch_length
            if "iter" not in record and ("time" in record or "val/time" in record):
                key = key.removeprefix("val/")
                if key in ("time", "data_time"):
                    key = f"val/{key}"
                elif key not in run.metrics:
                    run.metrics.append(key)
            found.setdefault(key, {})[x] = value
    for key, points in found.items():
        run.scalars[key] = sorted((dict(run.scalars.get(key, [])) | points).items())


def _training_x(run: Run, record: dict) -> float:
    if not run.by_epoch:
        return record["iter"]
    epoch = record.get("epoch", 1)
    # Clamped: a run that resumed with another batch size has epochs of two lengths.
    return min(max(record["iter"] / run.epoch_length, epoch - 1), epoch)
