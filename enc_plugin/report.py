"""Self-contained HTML report of training runs, from what mmengine wrote into their work dirs."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from mmengine.config import Config

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from .convert import format_table  # noqa: E402

# What is drawn, in this order, when a run logged it: key (or its beginning), title, axis with its unit.
CURVES = (
    ("accuracy/top1", "Validation accuracy", "top-1 accuracy (%)"),
    ("loss", "Training loss", "loss (nats)"),
    ("gbr/", "Generalization bound regularizer (GBR)", "mean squared Jacobian norm\n(output² per input²)"),
)
FGSM_PREFIX = "fgsm/top1_eps"
# Settings that differ between any two runs and say nothing of what was trained.
NOT_COMPARED = ("work_dir", "experiment_name", "launcher", "load_from", "resume")


@dataclass
class Run:
    """One run: its name, config, and every scalar as a list of (epoch or iteration, value)."""

    name: str
    config: dict
    scalars: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def last(self, key: str) -> float:
        """Last value logged under ``key``; NaN if there is none."""
        return self.scalars[key][-1][1] if key in self.scalars else math.nan


def load_run(work_dir: str | Path, name: str | None = None) -> Run:
    """Read the newest run of a work dir.

    Args:
        work_dir: Folder that mmengine trained in.
        name: What the report calls the run; default: the folder's name.

    Raises:
        FileNotFoundError: If the folder holds no ``scalars.json``.
    """
    logs = sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
    if not logs:
        raise FileNotFoundError(
            f"work_dir: {work_dir} holds no <time>/vis_data/scalars.json; give the folder that tools/train.py wrote to"
        )
    run = Run(name or Path(work_dir).name, {})
    config = logs[-1].with_name("config.py")
    if config.is_file():
        run.config = Config.fromfile(config, import_custom_modules=False).to_dict()
    epoch = 0
    # A run in progress may have written half of its last line.
    lines = logs[-1].read_text().split("\n")[:-1]
    for record in map(json.loads, lines):
        # Training lines count iterations in `step` and carry the epoch; all others count epochs in `step`.
        training = "loss" in record
        epoch = record.get("epoch", epoch) if training else record.get("step", epoch)
        for key, value in record.items():
            if key in ("step", "epoch", "iter") or not isinstance(value, (int, float)):
                continue
            if key in ("time", "data_time"):
                key = f"{'train' if training else 'val'}/{key}"
            run.scalars.setdefault(key, []).append((epoch, value))
    return run


def summary(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the summary table: one row a run, one column for everything that any of them logged."""
    columns: list[tuple[str, str, str]] = [
        ("accuracy/top1", "top-1 (%)", ".2f"),
        ("enc/layers", "ENC layers", ".0f"),
        ("enc/max_deviation", "deviation from alpha", ".1e"),
    ]
    for key in _keys(runs, "gbr/"):
        if not key.endswith(("_sem", "/seconds")):
            columns.append((key, f"GBR {key.removeprefix('gbr/')}", ".4g"))
    for key in _keys(runs, FGSM_PREFIX):
        columns.append((key, f"top-1 (%) under FGSM {key.removeprefix(FGSM_PREFIX)}/255", ".2f"))
    columns.append(("train/time", "s / iteration", ".4f"))
    columns = [column for column in columns if any(column[0] in run.scalars for run in runs)]
    rows = []
    for run in runs:
        cells = [run.name]
        for key, _, form in columns:
            value = run.last(key)
            if key == "train/time" and key in run.scalars:
                value = sum(v for _, v in run.scalars[key]) / len(run.scalars[key])
            cell = "" if key not in run.scalars else format(value, form)
            if f"{key}_sem" in run.scalars:
                cell += f" ± {run.last(f'{key}_sem'):.2g}"
            cells.append(cell)
        rows.append(cells)
    return ["run", *(title for _, title, _ in columns)], rows


def write_report(
    work_dirs: Sequence[str | Path], out: str | Path, names: Sequence[str] | None = None, title: str = "ENC report"
) -> str:
    """Compare runs on one HTML page that needs no other file.

    Args:
        work_dirs: Folders that mmengine trained in, one a run.
        out: HTML file to write; its folder is made.
        names: What the report calls the runs; default: the folders' names.
        title: Heading of the page.

    Returns:
        The summary table as plain text.

    Raises:
        FileNotFoundError: If a folder holds no run.
        ValueError: If there are no folders, or not one name each.
    """
    names = list(names) if names is not None else [Path(w).name for w in work_dirs]
    if not work_dirs or len(names) != len(work_dirs):
        raise ValueError(f"names: expected one name a work dir, at least one; got {len(names)} for {len(work_dirs)}")
    runs = [load_run(work_dir, name) for work_dir, name in zip(work_dirs, names, strict=True)]
    head, rows = summary(runs)
    sections = [f"<h2>Summary</h2>{_table(head, rows)}", "<h2>Curves</h2>", *_figures(runs)]
    differences = config_differences(runs)
    if differences:
        sections.append(f"<h2>Settings that differ</h2>{_table(['setting', *names], differences)}")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(_PAGE.format(title=html.escape(title), body="\n".join(sections)), encoding="utf-8")
    return format_table(head, rows)


def config_differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows (dotted setting, value in each run) for settings that are not the same in all runs."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = sorted(set().union(*flat))
    rows = [[key, *(repr(f[key]) if key in f else "" for f in flat)] for key in keys if key not in NOT_COMPARED]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flatten(value: object, prefix: str = "") -> Iterable[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _keys(runs: Sequence[Run], prefix: str) -> list[str]:
    """Keys with the prefix in the order in which they were first logged."""
    return list(dict.fromkeys(key for run in runs for key in run.scalars if key.startswith(prefix)))


def _figures(runs: Sequence[Run]) -> list[str]:
    figures = []
    for prefix, title, unit in CURVES:
        for key in _keys(runs, prefix):
            if (key != prefix and not prefix.endswith("/")) or key.endswith(("_sem", "/seconds")):
                continue
            what = f"{title}: {key.removeprefix(prefix)}" if prefix.endswith("/") else title
            figures.append(_curve(runs, key, what, unit))
    eps_keys = _keys(runs, FGSM_PREFIX)
    if eps_keys:
        figures.append(_fgsm(runs, eps_keys))
    return figures


def _curve(runs: Sequence[Run], key: str, title: str, unit: str) -> str:
    """One scalar against the epoch, a line a run, with the standard error as a band where it was logged."""
    with _style():
        figure, axes = plt.subplots()
        for run in runs:
            if key not in run.scalars:
                continue
            epochs, values = zip(*run.scalars[key], strict=True)
            axes.plot(epochs, values, marker="." if len(values) < 30 else None, label=run.name)
            if f"{key}_sem" in run.scalars:
                errors = [e for _, e in run.scalars[f"{key}_sem"]]
                low = [v - e for v, e in zip(values, errors, strict=True)]
                high = [v + e for v, e in zip(values, errors, strict=True)]
                axes.fill_between(epochs, low, high, alpha=0.25)
        if key.startswith("gbr/"):
            axes.set_yscale("log")
        axes.set(xlabel="epoch", ylabel=unit, title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        return _embed(figure, title)


def _fgsm(runs: Sequence[Run], keys: Sequence[str]) -> str:
    """Accuracy after the last epoch against the size of the FGSM step."""
    with _style():
        figure, axes = plt.subplots()
        for run in runs:
            points = [(float(key.removeprefix(FGSM_PREFIX)), run.last(key)) for key in keys if key in run.scalars]
            if "fgsm/top1_clean" in run.scalars:
                points.append((0.0, run.last("fgsm/top1_clean")))
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=run.name)
        axes.set(xlabel="FGSM step eps (1/255 of the pixel range)", ylabel="top-1 accuracy (%)", ylim=(0, 102))
        axes.set_title("Accuracy under white-box FGSM, last epoch")
        axes.legend(loc="lower left")
        return _embed(figure, "Accuracy under FGSM against eps")


def _style():
    settings = {"figure.figsize": (6.4, 3.8), "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
    return plt.style.context(["tableau-colorblind10", settings])


def _embed(figure, description: str) -> str:
    """The figure as an ``img`` element that carries its own pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #222; }}
h1, h2 {{ line-height: 1.2; }}
img {{ max-width: 100%; height: auto; display: block; margin: 1rem 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }}
th {{ border-bottom: 2px solid #888; }}
</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
