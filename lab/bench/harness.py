"""Interleaved timing (A B C ... A B C ...), so that a drift of the machine's speed affects all candidates equally."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable

import torch
from scipy.stats import quantile_test

from lab import ROOT
from lab.provenance import provenance


def wall_clock(call: Callable[[], object]) -> float:
    """Wall-clock seconds of a call, after a garbage collection."""
    gc.collect()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def event_clock(call: Callable[[], object], calls: int = 5) -> float:
    """Seconds of a call on the GPU: the mean of ``calls`` successive calls, measured by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def interleave(
    candidates: dict[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 1,
    clock: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, list[float]]:
    """Run each candidate once in each of ``rounds`` rounds; return the seconds, without those of ``warmup`` rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, call in candidates.items():
            elapsed = clock(call)
            if i >= warmup:
                seconds[name].append(elapsed)
    return seconds


def ratios(seconds: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """For each candidate, the median seconds, and the median of the ratios to ``reference`` within each round.

    The 95 % interval of the median ratio is by order statistics, for any distribution. With fewer than six rounds there
    is none, and the smallest and largest ratio are used instead. The table has these two as well.
    """
    table = {}
    for name, times in seconds.items():
        pairs = [t / r for t, r in zip(times, seconds[reference], strict=True)]
        low, high = quantile_test(pairs, q=1.0, p=0.5).confidence_interval(0.95)
        table[name] = {
            "seconds": statistics.median(times),
            "ratio": statistics.median(pairs),
            "ratio_low": min(pairs) if math.isnan(low) else float(low),
            "ratio_high": max(pairs) if math.isnan(high) else float(high),
            "ratio_min": min(pairs),
            "ratio_max": max(pairs),
            "rounds": len(times),
        }
    return table


def machine() -> dict[str, object]:
    """The machine and software of a result: processor, GPU, threads, versions, and commit (see :func:`provenance`)."""
    found = provenance(ROOT)
    return {
        "cpu": found["processor"],
        "commit": found["commit"],
        "threads": found["threads"],
        "torch": torch.__version__,
        "python": found["python"],
        **({"gpu": found["gpu"]} if "gpu" in found else {}),
    }


def goal(what: str, found: float | dict[str, float], at_most: float, at_least: float = 0.0) -> dict[str, object]:
    """A row of the table of goals: ``found`` (a row of :func:`ratios`, or a count) should be in the given range."""
    if not isinstance(found, dict):
        found = dict.fromkeys(("ratio", "ratio_low", "ratio_high"), found)
    value, low, high = (found[key] for key in ("ratio", "ratio_low", "ratio_high"))
    return {"what": what, "value": value, "low": low, "high": high, "at_least": at_least, "at_most": at_most}
