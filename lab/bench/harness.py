"""Interleaved timing (A B C ... A B C ...), so that a drift of the machine's speed affects all candidates equally."""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


def held(row: dict) -> str:
    """Whether a goal holds: ``yes`` or ``no`` if the whole interval is inside or outside of the range."""
    if row["at_least"] <= row["low"] and row["high"] <= row["at_most"]:
        return "yes"
    return "**no**" if row["low"] > row["at_most"] or row["high"] < row["at_least"] else "within the noise"


def write_section(path: Path, result: dict) -> None:
    """Write a result and the machine to the JSON file ``path``, and a bar chart next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1, sort_keys=False) + "\n")
    draw_ratios(path)


def tables(result: dict, name: str = "") -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Find all tables of :func:`ratios` in a result, with their names, such as ``exact, to enc_plugin``."""
    for key, value in result.items():
        if isinstance(value, dict) and value:
            title = f"{name}, {key}" if name else key
            if all(isinstance(row, dict) and "ratio_min" in row for row in value.values()):
                yield title.replace("_", " "), value
            else:
                yield from tables(value, title)


def draw_ratios(path: Path) -> None:
    """Draw the chart of a section's JSON file: a bar chart for each table, with the interval of each median."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = list(tables(json.loads(path.read_text())))
    if not found:
        return
    heights = [0.3 * len(rows) + 0.9 for _, rows in found]
    figure, axes = plt.subplots(
        len(found), 1, figsize=(8, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for (title, rows), ax in zip(found, axes[:, 0], strict=True):
        values = [row["ratio"] for row in rows.values()]
        spread = [
            [r["ratio"] - r["ratio_low"] for r in rows.values()],
            [r["ratio_high"] - r["ratio"] for r in rows.values()],
        ]
        colors = ["#0072B2" if "enc" in name.lower() else "#999999" for name in rows]  # ENC in blue, others in grey
        ax.barh(list(rows), values, color=colors, xerr=spread, ecolor="#333333", capsize=2, height=0.7)
        ax.axvline(1, color="#D55E00", linewidth=1, linestyle="--")
        ax.invert_yaxis()
        ax.set_title(title, fontsize=9, loc="left")
        ax.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("time, ratio to the reference (median; whiskers: its 95 % interval)")
    figure.savefig(path.with_suffix(".png"), dpi=100)
    plt.close(figure)


def readme(folder: Path) -> str:
    """Text of the README of the results, from the JSON files: goals, and tables and charts of all sections."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m lab.bench --readme` from the JSON files here. Ratios are medians over interleaved",
        "rounds (A B C ... A B C ...), with 95 % intervals of the median (with fewer than six rounds: the range of all",
        "rounds); below 1 is faster. A goal holds or does not hold if the whole interval says so. ENC fro, wn, ws and",
        "centered_fro are the variants of eq. 20, 21, 22 and 23.",
        "",
        "## Goals",
        "",
        "| section | what | measured | goal | holds |",
        "|---|---|---|---|---|",
    ]
    for section, result in results.items():
        for row in result.get("goals", []):
            wanted = f"at most {row['at_most']:g}"
            if row["at_least"]:
                wanted = f"{row['at_least']:g} to {row['at_most']:g}"
            measured = f"{row['value']:.3f}"
            if row["low"] < row["high"]:
                measured += f" [{row['low']:.3f}, {row['high']:.3f}]"
            lines.append(f"| {section} | {row['what']} | {measured} | {wanted} | {held(row)} |")
    for section, result in results.items():
        on = result["machine"]
        lines += ["", f"## {section}", ""]
        machine_text = f"{on['cpu']}, {on['threads']} thread, torch {on['torch']}, commit {on.get('commit', 'unknown')}"
        if "gpu" in on:
            card = on["gpu"]
            machine_text = (
                f"{card['name']}, driver {card['driver']}, CUDA {card['cuda']}, cuDNN {card['cudnn']}, {machine_text}"
            )
        lines.append(f"{result.get('what', 'Several measurements')}. {machine_text}; [figures]({section}.json).")
        for title, rows in tables(result):
            lines += ["", f"**{title}**", "", "| | ms | ratio | rounds |", "|---|---|---|---|"]
            for name, row in rows.items():
                spread = f"[{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
                ms = f"{row['seconds'] * 1e3:.1f}"
                lines.append(f"| {name} | {ms} | {row['ratio']:.3f} {spread} | {row['rounds']} |")
        counts = result.get("counts")
        if counts:
            columns = list(next(iter(counts.values())))
            lines += [
                "",
                "| | " + " | ".join(c.replace("_", " ") for c in columns) + " |",
                "|---" * (len(columns) + 1) + "|",
            ]
            lines += [
                f"| {name} | " + " | ".join(f"{row[c]:.2f}" for c in columns) + " |" for name, row in counts.items()
            ]
        if any(tables(result)):
            lines += ["", f"![Ratios of {section}]({section}.png)"]
    return "\n".join(lines) + "\n"
