"""Interleaved timing: A B C ... A B C ..., so that a machine whose speed drifts slows all candidates alike."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def interleave(candidates: dict[str, Callable[[], object]], rounds: int = 7, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call: every candidate runs once in each of ``rounds`` rounds; ``warmup`` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, call in candidates.items():
            gc.collect()
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if i >= warmup:
                seconds[name].append(elapsed)
    return seconds


def ratios(seconds: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Per candidate: median seconds, and median, minimum and maximum of the round-by-round ratio to ``reference``."""
    table = {}
    for name, times in seconds.items():
        pairs = [t / r for t, r in zip(times, seconds[reference], strict=True)]
        table[name] = {
            "seconds": statistics.median(times),
            "ratio": statistics.median(pairs),
            "ratio_min": min(pairs),
            "ratio_max": max(pairs),
            "rounds": len(times),
        }
    return table


def machine() -> dict[str, object]:
    """What the figures depend on: processor, threads, versions, and the commit (with ``-dirty`` if files differ)."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    describe = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "commit": commit or "unknown",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(section: str, result: dict) -> Path:
    """Write ``bench/results/<section>.json`` with the machine beside the figures."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{section}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1, sort_keys=False) + "\n")
    return path
