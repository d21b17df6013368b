"""The segments of a run's log: one for each start or resumption of the run, and how to join them."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mmengine.config import Config

from ..engine import SCALARS
from ..engine.scalars import declared

if TYPE_CHECKING:
    from .runs import Run


@dataclass
class Segment:
    """The records that one training process wrote."""

    config: dict
    records: list[dict]
    broken: int

    @cached_property
    def training(self) -> list[dict]:
        """The records of training."""
        return [record for record in self.records if "iter" in record]

    @property
    def makes_up(self) -> bool:
        """Whether the process resumed the run only for a validation that was still missing, without training."""
        return not self.training and any(map(_validates, self.records)) and bool(self.config.get("resume"))

    @property
    def log_interval(self) -> int:
        """Iterations between two records of training."""
        return ((self.config.get("default_hooks") or {}).get("logger") or {}).get("interval", 10)


def read_segment(path: Path, notes: list[str]) -> Segment:
    """Read a ``scalars.json`` and the config beside it; append to ``notes`` if the config cannot be read."""
    config, file = {}, path.with_name("config.py")
    try:
        if file.is_file():
            config = Config.fromfile(file, import_custom_modules=False).to_dict()
    except Exception as error:  # a config is code, so it can raise anything
        notes.append(f"{file.name} could not be read ({type(error).__name__}: {error})")
    records, broken = [], 0
    # The last line of a run in progress may be incomplete.
    for line in path.read_text(errors="replace").split("\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if isinstance(record, dict):
            records.append(record)
    return Segment(config, records, broken)


def newest_start(segments: list[Segment], notes: list[str]) -> list[Segment]:
    """The segments of the newest start in the folder: the start and its resumptions."""
    chain: list[Segment] = []
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


def counts_epochs(config: dict, training: list[dict]) -> bool:
    """Whether a run with this config and these records trains by epochs."""
    train = config.get("train_cfg") or {}
    if "by_epoch" in train:
        return bool(train["by_epoch"])
    if "type" in train:
        return "Iter" not in str(train["type"])
    return any("epoch" in record for record in training) or not training


def join(run: Run, segment: Segment) -> None:
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
                x = x or (iteration if _validates(record) else 0)
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


def _validates(record: dict) -> bool:
    """Whether a record is of a validation."""
    return "iter" not in record and ("time" in record or "val/time" in record)


def _key(run: Run, key: str, record: dict) -> str:
    """Key of a scalar of a record in a run, without the loop prefix that log_with_hierarchy writes."""
    loop = "train" if "iter" in record else "val" if _validates(record) else ""
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
