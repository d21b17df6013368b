"""Self-contained HTML report that compares training runs, from what mmengine wrote into their work dirs."""

from __future__ import annotations

from ..installation import needs_mmengine  # noqa: F401

# isort: split
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..build import load_config, load_model
from ..convert import audit
from ..surgery.folded import FoldedAudit
from ..table import format_table
from . import page, plot
from .runs import MONITOR, Run, default_names, load_run

__all__ = ["Run", "config_differences", "load_run", "summary", "write_report"]

FGSM_PREFIX = "fgsm/top1_eps"
MEASURED = ("gbr/", "fgsm/")
# Settings that differ between any two runs and say nothing of what was trained.
NOT_COMPARED = ("work_dir", "experiment_name", "launcher", "load_from", "resume")
# Keys that have a figure or a column of their own, or none.
DRAWN = re.compile(
    rf"(loss|lr|accuracy/top1|memory|(train|val)/(data_)?time|enc/.*|gbr/.*|fgsm/averaged|{MONITOR}.*|.*/seconds)$"
)
AXES = {"accuracy/top1": "top-1 accuracy (%)", "accuracy/top5": "top-5 accuracy (%)", "loss": "loss (nats)"}
MONITORED = {
    "norm": ("Norm of the free weights W", "Frobenius norm of W"),
    "angle": ("Rotation of W in one step", "angle (radians)"),
    "effective_lr": ("Effective learning rate", "lr / squared length of W"),
    "deviation": ("Deviation from the constraint", "|squared norm / alpha - 1|"),
}
MAIN_METRICS = 4  # where there is no accuracy
MORE_FIGURES = 24  # of scalars that this page knows nothing of
FOLDED_ROWS = 30  # from here on a table starts folded away


@dataclass(frozen=True)
class Layers:
    """A run's last checkpoint with the batch norms folded in, or why there is none."""

    checkpoint: str = ""
    table: FoldedAudit | None = None
    reason: str = ""


def write_report(
    work_dirs: Sequence[str | Path],
    out: str | Path,
    names: Sequence[str] | None = None,
    title: str = "ENC report",
    *,
    norms: bool = True,
) -> str:
    """Compare runs on one HTML page that needs no other file.

    The runs may be of any kind: with or without this plugin, in progress, resumed, by epochs or by iterations, of
    different lengths. What no run logged has no place on the page. Equal logs give an equal page.

    Args:
        work_dirs: Folders that mmengine trained in, one a run.
        out: HTML file to write; its folder is made.
        names: What the report calls the runs; default: the folders' names.
        title: Heading of the page.
        norms: Build each run's model and load its last checkpoint for the norms of its layers. A run for which that
            fails is named on the page, with the reason.

    Returns:
        The summary table as plain text.

    Raises:
        FileNotFoundError: If a folder holds no run.
        ValueError: If there are no folders, or not one name each.
    """
    names = list(names) if names is not None else default_names(work_dirs)
    if not work_dirs or len(names) != len(work_dirs):
        raise ValueError(f"names: expected one name a work dir, at least one; got {len(names)} for {len(work_dirs)}")
    runs = [load_run(work_dir, name) for work_dir, name in zip(work_dirs, names, strict=True)]
    layers = [_read_layers(run) for run in runs] if norms else []
    head, rows = summary(runs)
    sections = [
        page.section("Summary", page.table(head, rows), *_notes(runs), *_measurements(runs)),
        *_curves(runs),
        *_gbr(runs),
        *_fgsm(runs),
        *_layers(runs, layers),
        *_cost(runs),
        *_differences(runs),
        *_more(runs),
    ]
    page.save(page.render(title, *sections), out)
    return format_table(head, rows)


def summary(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the summary table: one row a run, one column for everything that any of them logged.

    A run's row is about one network: accuracy, GBR and FGSM are of the weights that its validation sees, which a column
    names. A value from another epoch than the last validation says so.
    """
    unit = _unit(runs)
    columns: list[tuple[str, str, str]] = [
        ("accuracy/top1", "top-1 (%)", ".2f"),
        ("enc/layers", "ENC layers", ".0f"),
        ("enc/max_deviation", "deviation from alpha", ".1e"),
    ]
    columns[1:1] = [(key, key, ".4g") for key in _main_metrics(runs) if key != "accuracy/top1"]
    for key in _gbr_keys(runs):
        columns.append((key, f"GBR {key.removeprefix('gbr/')}", ".4g"))
    for key in _keys(runs, FGSM_PREFIX):
        columns.append((key, f"top-1 (%), FGSM {key.removeprefix(FGSM_PREFIX)}/255", ".2f"))
    columns = [column for column in columns if any(column[0] in run.scalars for run in runs)]
    weights = [_weights(run) for run in runs]
    rows = []
    for run, of_weights in zip(runs, weights, strict=True):
        cells = [run.name, run.progress + ("" if run.by_epoch or unit != "epochs" else " iterations")]
        for key, _, form in columns:
            cell = "" if key not in run.scalars else format(run.last(key), form)
            if f"{key}_sem" in run.scalars:
                cell += f" ± {run.last(f'{key}_sem'):.2g}"
            cells.append(cell + _when(run, key))
        if any(weights):
            cells.append(of_weights)
        cells.append("" if math.isnan(run.seconds_per_iteration) else f"{run.seconds_per_iteration:.4f}")
        rows.append(cells)
    titles = [title for _, title, _ in columns] + ["weights"] * any(weights)
    return ["run", unit, *titles, "s / iteration"], rows


def _weights(run: Run) -> str:
    """Which weights the run's accuracy, GBR and FGSM are of, as far as its hooks have logged it."""
    logged = [key for key in ("gbr/averaged", "fgsm/averaged") if key in run.scalars]
    if not logged:
        return ""
    newest = max(logged, key=lambda key: run.scalars[key][-1][0])
    return "averaged" if run.last(newest) else "in training"


def _when(run: Run, key: str) -> str:
    """Where a measurement was made, if that is not where the run was validated last."""
    validated = [run.scalars[metric][-1][0] for metric in run.metrics if metric in run.scalars]
    if not key.startswith(MEASURED) or key not in run.scalars or not validated:
        return ""
    place = run.scalars[key][-1][0]
    return "" if place == max(validated) else f" (at {place:.4g})"


def config_differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows (dotted setting, value in each run) for settings that are not the same in all runs that have a config.

    An entry of a list of parts is named by its type, as in ``custom_hooks[GBRHook].interval``.
    """
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = sorted(set().union(*flat))
    rows = {key: [repr(f[key]) if key in f else "" for f in flat] for key in keys if key not in NOT_COMPARED}
    known = [bool(f) for f in flat]
    rows = {
        key: cells
        for key, cells in rows.items()
        if len({cell for cell, there in zip(cells, known, strict=True) if there}) > 1
    }
    # A test set is mostly the validation set once more.
    twins = {key for key in rows if key.startswith("test_") and rows.get(f"val_{key[5:]}") == rows[key]}
    return [[key, *cells] for key, cells in rows.items() if key not in twins]


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


def _unit(runs: Sequence[Run]) -> str:
    """What the x axes of all figures count: epochs, unless a run has none."""
    return "epochs" if all(run.by_epoch for run in runs) else "iterations"


def _keys(runs: Sequence[Run], prefix: str) -> list[str]:
    """Keys with the prefix in the order in which they were first logged."""
    return list(dict.fromkeys(key for run in runs for key in run.scalars if key.startswith(prefix)))


def _gbr_keys(runs: Sequence[Run]) -> list[str]:
    beside = ("_sem", "/seconds", "_seconds", "/averaged")
    return [key for key in _keys(runs, "gbr/") if not key.endswith(beside)]


def _series(runs: Sequence[Run], key: str, band: tuple[str, str] | None = None) -> list[plot.Series | None]:
    """A key's points in each run (None: not logged), with its standard error or the two keys ``band`` as a band."""
    scale = [run.epoch_length if run.by_epoch and _unit(runs) == "iterations" else 1 for run in runs]
    series: list[plot.Series | None] = []
    for run, factor in zip(runs, scale, strict=True):
        if key not in run.scalars:
            series.append(None)
            continue
        places, values = zip(*run.scalars[key], strict=True)
        x = [place * factor for place in places]
        if band is not None:
            low, high = ([dict(run.scalars.get(k, [])).get(place, math.nan) for place in places] for k in band)
            series.append(plot.Series(run.name, x, values, low, high))
        elif f"{key}_sem" in run.scalars:
            errors = dict(run.scalars[f"{key}_sem"])
            error = [errors.get(place, math.nan) for place in places]
            series.append(plot.Series.with_error(run.name, x, values, error))
        else:
            series.append(plot.Series(run.name, x, values))
    return series


def _draw(runs: Sequence[Run], key: str, title: str, ylabel: str, caption: str = "", **options) -> page.Html:
    """The figure of a key over training."""
    series = _series(runs, key, options.pop("band", None))
    unit = _unit(runs).removesuffix("s")
    png = plot.curves(series, unit, ylabel, title, whole_x=unit == "epoch", **options)
    named = ", ".join(run.name for run, one in zip(runs, series, strict=True) if one is not None)
    return page.figure(png, f"{title} over training, by {unit}: {named}", caption)


def _main_metrics(runs: Sequence[Run]) -> list[str]:
    """What validation is about: accuracy, else all that it logged."""
    metrics = list(dict.fromkeys(key for run in runs for key in run.metrics))
    return ["accuracy/top1"] if "accuracy/top1" in metrics else metrics[:MAIN_METRICS]


def _curves(runs: Sequence[Run]) -> list[page.Html]:
    figures = []
    for key in _main_metrics(runs):
        title = "Validation accuracy" if key == "accuracy/top1" else f"Validation: {key}"
        figures.append(_draw(runs, key, title, AXES.get(key, key)))
    if _keys(runs, "loss"):
        figures.append(_draw(runs, "loss", "Training loss", AXES["loss"]))
    rates = [value for run in runs for value in run.values("lr")]
    if rates:
        wide = min(rates) > 0 and max(rates) > 5 * min(rates)
        figures.append(_draw(runs, "lr", "Learning rate", "learning rate", logy=wide))
    return [page.section("Curves", page.grid(*figures))] if figures else []


def _gbr(runs: Sequence[Run]) -> list[page.Html]:
    keys = _gbr_keys(runs)
    if not keys:
        return []
    figures = [
        _draw(
            runs,
            key,
            f"GBR: {key.removeprefix('gbr/')}",
            f"mean squared Jacobian norm\n({_unit_of(runs, key)})",
            logy=True,
        )
        for key in keys
    ]
    text = (
        "Mean squared Frobenius norm of the input-output Jacobian, over the same training samples through each run: "
        "the smaller, the less the output moves with the input. The network is the one that validation sees. Bands: "
        "one standard error to each side."
    )
    blocks: list[str] = [text, page.grid(*figures)]
    for key in keys:
        units = {run.measurements[key]["unit"] for run in runs if key in run.measurements}
        if len(units) > 1:
            blocks.insert(
                1,
                page.note(f"The runs' {key} differ in their unit ({'; '.join(sorted(units))}): do not compare them."),
            )
    return [page.section("Generalization bound regularizer (GBR)", *blocks)]


def _fgsm(runs: Sequence[Run]) -> list[page.Html]:
    """Accuracy where each run stands against the size of the FGSM step."""
    keys = _keys(runs, FGSM_PREFIX)
    if not keys:
        return []
    series: list[plot.Series | None] = []
    for run in runs:
        points = [(float(key.removeprefix(FGSM_PREFIX)), run.last(key)) for key in keys if key in run.scalars]
        if points and "fgsm/top1_clean" in run.scalars:
            points.append((0.0, run.last("fgsm/top1_clean")))
        series.append(plot.Series(run.name, *zip(*sorted(points), strict=True)) if points else None)
    title = "Accuracy under white-box FGSM, last measurement"
    png = plot.curves(series, "FGSM step eps (1/255 of the pixel range)", AXES["accuracy/top1"], title, ylim=(0, 102))
    text = "One gradient step of size eps in pixel space against each validation image; eps 0 is no attack."
    blocks = [text, page.grid(page.figure(png, f"{title}, against eps"))]
    masked = [run.name for run in runs if run.last("fgsm/zero_grad") > 0.01]
    if masked:
        blocks.append(
            page.note(
                f"More than 1 % of the images have an all-zero gradient in {', '.join(masked)}: FGSM overrates the "
                "robustness there; go by PGD (tools/attack.py --pgd-steps)."
            )
        )
    return [page.section("Robustness (FGSM)", *blocks)]


def _read_layers(run: Run) -> Layers:
    """Norms of the last checkpoint's layers. Whatever goes wrong is a reason and not an error."""
    path = _last_checkpoint(run.work_dir)
    if path is None:
        return Layers(reason="no checkpoint in the work dir")
    if not run.config.get("model"):
        return Layers(reason="no config with a model")
    try:
        config = load_config(sorted(run.work_dir.glob("**/vis_data/config.py"))[-1])
        model, meta = load_model(config, path)
        name = f"{path.name} (averaged weights)" if meta["weights"] == "averaged" else path.name
        return Layers(name, audit(model, folded=True))
    except Exception as error:  # models and their configs are any code
        text = " ".join(str(error).split())
        return Layers(reason=f"{path.name}: {type(error).__name__}: {text[:300]}")


def _last_checkpoint(work_dir: Path) -> Path | None:
    """The checkpoint that mmengine names as the last, also where the folder was moved; else the highest number."""
    named = work_dir / "last_checkpoint"
    if named.is_file():
        path = Path(named.read_text().strip())
        for candidate in (work_dir / path.name, path):
            if candidate.is_file():
                return candidate
    numbered = [(int(m[1]), p) for p in work_dir.glob("*.pth") if (m := re.fullmatch(r"(?:epoch|iter)_(\d+)", p.stem))]
    return max(numbered)[1] if numbered else None


def _layers(runs: Sequence[Run], layers: Sequence[Layers]) -> list[page.Html]:
    blocks: list[str] = []
    figures = []
    tables = [one.table for one in layers]
    if any(tables):
        series = [
            plot.Series(run.name, range(1, len(table) + 1), [row.sq_norm for row in table]) if table else None
            for run, table in zip(runs, tables, strict=True)
        ]
        title = "Squared norm of each layer, batch norms folded in"
        png = plot.curves(series, "layer, from the input", "squared Frobenius norm", title, logy=True, whole_x=True)
        figures.append(page.figure(png, title, "Last checkpoint; kernels diag(γ/σ) W."))
    layerwise = [key for key in _keys(runs, MONITOR) if key.endswith("/norm")]
    if layerwise:
        series = [
            plot.Series(run.name, range(1, len(own) + 1), [run.last(key) for key in own]) if own else None
            for run in runs
            for own in [[key for key in layerwise if key in run.scalars]]
        ]
        title = "Norm of each layer's free weight W"
        png = plot.curves(series, "ENC layer, from the input", "Frobenius norm of W", title, logy=True, whole_x=True)
        figures.append(page.figure(png, title, "Last measurement."))
    for quantity, (title, ylabel) in MONITORED.items():
        key = f"{MONITOR}{quantity}/median"
        if _keys(runs, key):
            band = (f"{MONITOR}{quantity}/min", f"{MONITOR}{quantity}/max")
            caption = "Median over the ENC layers; band: smallest to largest."
            figures.append(_draw(runs, key, title, ylabel, caption, logy=True, band=band))
    if figures:
        blocks.append(page.grid(*figures))
    if any(tables):
        blocks.append(
            "AM-GM slack: log of the mean power over the product of the layers' norms (eq. 17). It is 0 where all "
            "layers have the same norm."
        )
        rows = [
            [
                run.name,
                one.checkpoint,
                f"{len(one.table)}",
                f"{one.table.slack:.4g}",
                f"{len(one.table.unfolded) or ''}",
            ]
            for run, one in zip(runs, layers, strict=True)
            if one.table
        ]
        head = ["run", "checkpoint", "layers", "AM-GM slack", "batch norms that fold into no layer"]
        blocks.append(page.table(*_filled(head, rows)))
        blocks.append(page.details("Squared norm of every layer", _layer_table(runs, tables)))
        missing = [f"{run.name}: {one.reason}" for run, one in zip(runs, layers, strict=True) if one.table is None]
        if missing:
            blocks.extend(["Without norms of their layers:", page.items(*missing)])
    elif layers:
        reasons = [f"{run.name}: {one.reason}" for run, one in zip(runs, layers, strict=True)]
        blocks.append(page.details("Why no checkpoint was read", page.items(*reasons)))
    return [page.section("Layers", *blocks)] if blocks else []


def _layer_table(runs: Sequence[Run], tables: Sequence[FoldedAudit | None]) -> page.Html:
    shown = [
        (run.name, {row.name: row.sq_norm for row in table}) for run, table in zip(runs, tables, strict=True) if table
    ]
    names = list(dict.fromkeys(name for _, norms in shown for name in norms))
    rows = [[name, *(f"{norms[name]:.4g}" if name in norms else "" for _, norms in shown)] for name in names]
    return page.table(["layer", *(name for name, _ in shown)], rows)


def _cost(runs: Sequence[Run]) -> list[page.Html]:
    head = ["run", "iterations", "s / iteration (median)", "waiting for data (%)", "training (s)", "measurements (s)"]
    head.append("peak memory (MB)")
    rows = []
    for run in runs:
        time = run.seconds_per_iteration
        waited, spent = sum(run.values("train/data_time")), sum(run.values("train/time"))
        keys = [
            key
            for key in run.scalars
            if key.endswith("/seconds") or key.startswith("gbr/") and key.endswith("_seconds")
        ]
        measured = [sum(run.values(key)) for key in keys]
        memory = run.values("memory")
        cells = [run.name, str(run.iterations), "" if math.isnan(time) else f"{time:.4f}"]
        cells.append(f"{100 * waited / spent:.0f}" if spent else "")
        cells.append("" if math.isnan(time) else f"{time * run.iterations:.0f}")
        cells.append(f"{sum(measured):.1f}" if measured else "")
        cells.append(f"{max(memory):.0f}" if memory else "")
        rows.append(cells)
    table = page.table(*_filled(head, rows))
    text = "Training is the median time of an iteration times their number; validation is not counted."
    return [page.section("Cost", table, text)]


def _filled(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns that are empty in all rows."""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return [head[i] for i in used], [[row[i] for i in used] for row in rows]


def _differences(runs: Sequence[Run]) -> list[page.Html]:
    if len(runs) < 2:
        return []
    unknown = [run.name for run in runs if not run.config]
    blocks: list[str] = []
    rows = config_differences(runs)
    if rows:
        table = page.table(["setting", *(run.name for run in runs)], rows)
        blocks.append(table if len(rows) < FOLDED_ROWS else page.details(f"{len(rows)} settings", table))
    elif len(runs) - len(unknown) > 1:
        blocks.append("None: the configs are equal.")
    if unknown:
        blocks.append(page.note(f"No config was found for {', '.join(unknown)}."))
    return [page.section("Settings that differ", *blocks)] if blocks else []


def _more(runs: Sequence[Run]) -> list[page.Html]:
    """Whatever else was logged, folded away."""
    main = _main_metrics(runs)
    keys = [
        key
        for key in _keys(runs, "")
        if not DRAWN.match(key) and key not in main and any(len(set(run.values(key))) > 1 for run in runs)
    ]
    if not keys:
        return []
    figures = [_draw(runs, key, key, AXES.get(key, key)) for key in keys[:MORE_FIGURES]]
    left_out = keys[MORE_FIGURES:]
    blocks: list[str] = [page.grid(*figures)]
    if left_out:
        blocks.append(f"Not drawn: {', '.join(left_out)}.")
    return [page.section("More", page.details(f"{len(figures)} more curves", *blocks))]


def _unit_of(runs: Sequence[Run], key: str) -> str:
    """The unit of a scalar, if the runs that say it agree."""
    units = {run.measurements[key]["unit"] for run in runs if key in run.measurements}
    return units.pop() if len(units) == 1 else "output² per input²"


def _measurements(runs: Sequence[Run]) -> list[page.Html]:
    """Of every column that was measured: weights, samples and unit, run by run where they differ."""
    keys = [key for prefix in ("gbr/", FGSM_PREFIX) for key in _keys(runs, prefix) if not key.endswith("_sem")]
    rows = []
    for key in keys:
        known = [run for run in runs if key in run.scalars and key in run.measurements]
        told = {run.name: tuple(run.measurements[key].get(x, "") for x in ("samples", "unit")) for run in known}
        for values in dict.fromkeys(told.values()):
            names = [name for name in told if told[name] == values]
            weights = dict.fromkeys(_weights(run) for run in known if run.name in names)
            rows.append([key, ", ".join(names), f"validated ({', '.join(weights)})", *values])
    blocks = [page.details("What was measured", page.table(["scalar", "runs", "weights", "samples", "unit"], rows))]
    old = [
        run.name
        for run in runs
        if "gbr/averaged" not in run.scalars
        and any(key in run.scalars for key in _gbr_keys(runs))
        and any("EMAHook" in str(hook.get("type")) for hook in run.config.get("custom_hooks") or [])
    ]
    if old:
        blocks.append(
            page.note(
                f"The GBR of {', '.join(old)} was logged by an earlier version: it is of the weights in training, "
                "while accuracy and FGSM are of the averaged ones."
            )
        )
    return blocks if rows else blocks[1:]


def _notes(runs: Sequence[Run]) -> list[page.Html]:
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    return [page.items(*notes)] if notes else []
