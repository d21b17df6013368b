"""Written results of the benchmarks: a JSON file and a chart for each section, and a README of all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from enc_plugin.reports import plot

from .harness import machine

_HEAD = """# Benchmarks

Written by `python -m lab.bench --readme` from the JSON files here. Ratios are medians over interleaved
rounds (A B C ... A B C ...), with 95 % intervals of the median (with fewer than six rounds: the range of all
rounds); below 1 is faster. A goal holds or does not hold if the whole interval says so. ENC fro, wn, ws and
centered_fro are the variants of eq. 20, 21, 22 and 23.

## Goals

| section | what | measured | goal | holds |
|---|---|---|---|---|"""


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
    found = list(tables(json.loads(path.read_text())))
    if not found:
        return
    heights = [0.3 * len(rows) + 0.9 for _, rows in found]
    figure = plot.new_figure((8, sum(heights)))
    axes = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)
    for (title, rows), ax in zip(found, axes[:, 0], strict=True):
        values = [row["ratio"] for row in rows.values()]
        spread = [
            [r["ratio"] - r["ratio_low"] for r in rows.values()],
            [r["ratio_high"] - r["ratio"] for r in rows.values()],
        ]
        colors = [plot.PALETTE[1] if "enc" in name.lower() else "#999999" for name in rows]  # ENC as in other figures
        # From 1 on a logarithmic axis: half the time and twice the time are bars of one length.
        ax.set_xscale("log")
        lengths = [value - 1 for value in values]
        ax.barh(list(rows), lengths, left=1, color=colors, xerr=spread, ecolor="#333333", capsize=2, height=0.7)
        lowest = min(r["ratio_low"] for r in rows.values())
        highest = max(r["ratio_high"] for r in rows.values())
        ax.set_xlim(min(0.9, lowest / 1.1), max(1.1, highest * 1.1))
        plot.log_ticks(ax.xaxis)
        ax.axvline(1, color="#333333", linewidth=1, linestyle="--")
        ax.invert_yaxis()
        ax.set_title(title, fontsize=9, loc="left")
        ax.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("time, ratio to the reference (median; whiskers: its 95 % interval)")
    figure.savefig(path.with_suffix(".png"), dpi=100)


def readme(folder: Path) -> str:
    """Text of the README of the results, from the JSON files: goals, and tables and charts of all sections."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    goals = [_goal_row(section, row) for section, result in results.items() for row in result.get("goals", [])]
    sections = [line for section, result in results.items() for line in _section(section, result)]
    return "\n".join([_HEAD, *goals, *sections]) + "\n"


def _goal_row(section: str, row: dict) -> str:
    wanted = f"{row['at_least']:g} to {row['at_most']:g}" if row["at_least"] else f"at most {row['at_most']:g}"
    measured = f"{row['value']:.3f}"
    if row["low"] < row["high"]:
        measured += f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"| {section} | {row['what']} | {measured} | {wanted} | {held(row)} |"


def _section(section: str, result: dict) -> Iterator[str]:
    """Lines of a section: machine, tables of ratios, table of counts, and chart."""
    yield from ("", f"## {section}", "")
    what, on = result.get("what", "Several measurements"), _machine_text(result["machine"])
    yield f"{what}. {on}; [figures]({section}.json)."
    for title, rows in tables(result):
        yield from ("", f"**{title}**", "", "| | ms | ratio | rounds |", "|---|---|---|---|")
        for name, row in rows.items():
            ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
            yield f"| {name} | {row['seconds'] * 1e3:.1f} | {ratio} | {row['rounds']} |"
    counts = result.get("counts")
    if counts:
        columns = list(dict.fromkeys(column for row in counts.values() for column in row))
        yield from ("", f"| | {' | '.join(c.replace('_', ' ') for c in columns)} |", "|---" * (len(columns) + 1) + "|")
        for name, row in counts.items():
            yield f"| {name} | {' | '.join(f'{row[c]:.2f}' if c in row else '' for c in columns)} |"
    if any(tables(result)):
        yield from ("", f"![Ratios of {section}]({section}.png)")


def _machine_text(on: dict) -> str:
    text = f"{on['cpu']}, {on['threads']} thread, torch {on['torch']}, commit {on.get('commit', 'unknown')}"
    if "gpu" not in on:
        return text
    card = on["gpu"]
    return f"{card['name']}, driver {card['driver']}, CUDA {card['cuda']}, cuDNN {card['cudnn']}, {text}"
