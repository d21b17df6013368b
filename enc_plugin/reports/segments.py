"""The segments of a run's log: one for each start or resumption of the run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmengine.config import Config


@dataclass
class Segment:
    """The records that one training process wrote, the file that holds them, and the config beside it."""

    file: Path
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
        return not self.training and any(map(validates, self.records)) and bool(self.config.get("resume"))

    @property
    def log_interval(self) -> int:
        """Iterations between two records of training."""
        return ((self.config.get("default_hooks") or {}).get("logger") or {}).get("interval", 10)


def read_segment(path: Path, notes: list[str]) -> Segment:
    """Read a ``scalars.json`` and the config beside it; append to ``notes`` if the config cannot be read."""
    config, source = {}, path.with_name("config.py")
    try:
        if source.is_file():
            config = Config.fromfile(source, import_custom_modules=False).to_dict()
    except Exception as error:  # a config is code, so it can raise anything
        notes.append(f"{source.name} could not be read ({type(error).__name__}: {error})")
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
    return Segment(path, config, records, broken)


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


def validates(record: dict) -> bool:
    """Whether a record is of a validation."""
    return "iter" not in record and ("time" in record or "val/time" in record)
