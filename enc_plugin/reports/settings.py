"""Differences between the configs of runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import page
from .runs import Run

# Settings that may differ between two starts of the same training.
_NOT_COMPARED = ("work_dir", "experiment_name", "launcher", "load_from", "resume")
_FOLDED_ROWS = 30  # a table with this many rows is collapsed


def config_differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows (dotted key, value in each run) of the settings that differ between the runs that have a config.

    An entry of a list of parts is named by its type, as in ``custom_hooks[GBRHook].interval``.
    """
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = sorted(set().union(*flat) - set(_NOT_COMPARED))
    rows = {key: [repr(f[key]) if key in f else "" for f in flat] for key in keys}
    rows = {key: cells for key, cells in rows.items() if len({c for c, f in zip(cells, flat, strict=True) if f}) > 1}
    # Settings of the test set are usually those of the validation set.
    repeated = {key for key in rows if key.startswith("test_") and rows.get(f"val_{key[5:]}") == rows[key]}
    return [[key, *cells] for key, cells in rows.items() if key not in repeated]


def settings_section(runs: Sequence[Run]) -> list[page.Html]:
    """The section about the differences; empty for a single run."""
    if len(runs) < 2:
        return []
    unknown = [run.name for run in runs if not run.config]
    blocks: list[str] = []
    rows = config_differences(runs)
    if rows:
        table = page.table(["setting", *(run.name for run in runs)], rows)
        blocks.append(table if len(rows) < _FOLDED_ROWS else page.details(f"{len(rows)} settings", table))
    elif len(runs) - len(unknown) > 1:
        blocks.append("None: the configs are equal.")
    if unknown:
        blocks.append(page.note(f"No config was found for {', '.join(unknown)}."))
    return [page.section("Settings that differ", *blocks)] if blocks else []


def _flatten(value: object, prefix: str = "") -> Iterable[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)) and value and all(isinstance(x, dict) and "type" in x for x in value):
        types = [str(x["type"]) for x in value]
        yield prefix, types
        for i, item in enumerate(value):
            double = types[:i].count(types[i])
            name = f"{prefix}[{types[i]}{f' {double + 1}' if double else ''}]"
            yield from _flatten({k: v for k, v in item.items() if k != "type"}, name)
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value
