"""Writes what a study found: a Markdown page, figures, a self-contained HTML page, and the README's lines."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from enc_plugin.reports import page, plot

from .claims import NOT_TESTED
from .execute import DIVERGED, FAILED, runs_folder
from .grid import CELLS, load_grid
from .results import Results, load_results
from .sections import Figure, Section, cell_efolds, sections
from .verdicts import MEANING, MIN_SEEDS

BEGIN, END = "<!-- study: written by python -m lab.study --pages -->", "<!-- end of study -->"
_TITLE = "Does ENC do what the paper says?"


def write_study(study: str | Path, readme: str | Path | None = None, grid: str | Path = CELLS) -> list[Path]:
    """Write ``README.md``, ``report.html``, ``figures/*.png`` and ``figures.json`` of a study from its results alone.

    The same results give the same files, byte for byte, with the same version of matplotlib; the texts and the numbers
    behind the figures (``figures.json``) do not depend on it.

    Args:
        study: Folder that holds the results in ``runs/``, and gets the files.
        readme: The project's README, whose lines between the study's two markers are rewritten; None: leave it alone.
        grid: File that declares the study's runs.

    Returns:
        The files that were written.

    Raises:
        ValueError: If the README lacks the markers, or the results do not fit the grid.
    """
    study = Path(study)
    found = load_results(load_grid(grid), runs_folder(study))
    parts = sections(found)
    figures = [figure for part in parts for figure in part.figures]
    pictures = {figure.name: draw(figure) for figure in figures}
    wanted = {study / "figures" / f"{name}.png": picture for name, picture in pictures.items()}
    texts = {
        study / "figures.json": json.dumps([_plain(figure) for figure in figures], indent=1) + "\n",
        study / "README.md": markdown(found, parts),
        study / "report.html": _html(found, parts, pictures),
    }
    if readme is not None:
        lines = headlines(found, parts, os.path.relpath(study, Path(readme).parent))
        texts[Path(readme)] = _insert(Path(readme).read_text(), lines, readme)
    for stale in set(study.glob("figures/*.png")) - set(wanted):
        stale.unlink()
    for path, picture in wanted.items():
        plot.save(picture, path)
    for path, text in texts.items():
        path.write_text(text)
    return [*texts, *wanted]


def draw(figure: Figure) -> bytes:
    """The figure as a PNG."""
    if figure.kind == "intervals":
        ends = ([math.nan if row[end] is None else row[end] for row in figure.data] for end in ("low", "high"))
        labels = [plot.shorten(row["label"], 56) for row in figure.data]
        means, groups = ([row[key] for row in figure.data] for key in ("mean", "group"))
        return plot.intervals(labels, means, *ends, figure.x_label, width=8.5, groups=groups, band=figure.band)
    if figure.kind == "scatter":
        series = [plot.Series(one["label"], one["x"], one["y"]) for one in figure.data]
        return plot.scatter(series, figure.x_label, figure.y_label, logx=figure.log_x, logy=figure.log_y)
    series = [one if one is None else _band(one) for one in figure.data]
    options = dict(logx=figure.log_x, logy=figure.log_y, whole_x=True)
    return plot.curves(series, figure.x_label, figure.y_label, **options)


def _band(curve: dict) -> plot.Series:
    low, high = ([math.nan if bound is None else bound for bound in curve[end]] for end in ("low", "high"))
    return plot.Series(curve["label"], curve["x"], curve["mean"], low, high)


def headlines(found: Results, parts: Sequence[Section], folder: str) -> str:
    """The answer on one screen: claim by arena, one word and one effect each; what stands in the project's README."""
    to_go = f"{len(found.missing)} planned ones to go" if found.missing else "all that are planned"
    note = f"[The study]({folder}/README.md): {len(list(found))} finished runs, {to_go}. {_WORDS}"
    pictures = [
        f"![{figure.caption}]({folder}/figures/{figure.name}.png)"
        for part in parts
        for figure in part.figures
        if figure.name == "cells_quarter"
    ]
    table = _markdown_table(*_summary(found, parts))
    return "\n".join([*table, "", f"Not tested: {NOT_TESTED}.", "", note, "", *_arena_items(found), "", *pictures])


def markdown(found: Results, parts: Sequence[Section]) -> str:
    """The study's page in Markdown: the answer first, then a section a claim."""
    text = [
        f"# {_TITLE}",
        "",
        *_markdown_table(*_summary(found, parts)),
        "",
        f"Not tested: {NOT_TESTED}.",
        "",
        _WORDS,
        "",
    ]
    text += [*_arena_items(found), "", _METHOD, "", _INTRODUCTION, "", "Sections:", ""]
    text += [f"- [{title}](#{_anchor(title)})" for title in (*(part.title for part in parts), _RUNS)] + [""]
    for part in parts:
        text += [f"## {part.title}", "", part.claim, ""]
        text += [*_markdown_table(*_verdict_table(found, part)), ""] if part.verdicts else []
        for title, head, rows in part.tables:
            text += [*([f"{title}:", ""] if title else []), *_markdown_table(head, rows), ""]
        text += [f"- {line}" for line in part.text] + ([""] if part.text else [])
        for figure in part.figures:
            text += [f"![{figure.caption}](figures/{figure.name}.png)", "", f"*{figure.caption}*", ""]
    text += [f"## {_RUNS}", ""]
    for line in _about_runs(found):
        text += [line, ""]
    head, rows = _run_table(found)
    rows = [[f"[{row[0]}](runs/{row[0]}.json)", *row[1:]] for row in rows]
    text += _markdown_table(head, rows)
    return "\n".join(text) + "\n"


def _html(found: Results, parts: Sequence[Section], pictures: dict[str, bytes]) -> str:
    """The same as one HTML page that needs no other file; figures by name."""
    blocks: list[str] = [page.table(*_plain_cells(*_summary(found, parts))), f"Not tested: {NOT_TESTED}."]
    blocks += [_WORDS.replace("*", ""), page.items(*_arenas(found)), _METHOD, _INTRODUCTION.replace("`", "")]
    for part in parts:
        drawn = [
            page.figure(pictures[figure.name], alt=figure.caption, caption=figure.caption) for figure in part.figures
        ]
        blocks.append(
            page.section(
                part.title,
                part.claim,
                *([page.table(*_plain_cells(*_verdict_table(found, part)))] if part.verdicts else []),
                *(page.table(head, rows, title) for title, head, rows in part.tables),
                *([page.items(*part.text)] if part.text else []),
                *([page.grid(*drawn)] if drawn else []),
            )
        )
    runs = page.details("Every run", page.table(*_run_table(found)))
    blocks.append(page.section(_RUNS, *_about_runs(found), runs))
    return page.render(_TITLE, *blocks)


_RUNS = "All runs"
_INTRODUCTION = (
    "Every number below is computed from the files in `runs/`, one a run, each with its config, changes, seed, "
    "commit and versions; `lab/study/cells.py` declares the runs. `python -m lab.study` carries out what is missing, "
    "`python -m lab.study --pages` writes this page again."
)
_WORDS = (
    "Each cell has one word, and ENC's effect with its 95 % interval over seeds: "
    + "; ".join(f"*{word}*: {meaning}" for word, meaning in MEANING.items())
    + ". ENC is 'ws' (eq. 22) with its batch norm behind the classifier."
)
_METHOD = (
    "Effects are contrasts of cell means by Welch's interval: cells may differ in spread and number of seeds, and runs "
    "of equal seeds are not paired, since the data show hardly any correlation within a seed. Where cells are compared "
    "by their ratio (x), means are geometric. Intervals are not corrected for their number. A result is one so far "
    f"while its arena has runs to go. No word rests on fewer than {MIN_SEEDS} seeds. Claims, effects and words were "
    "declared before the runs of the arena overfit, and after those of the other three. The networks and schedules are "
    "far smaller than the paper's: a word is about this scale."
)


def _arenas(found: Results) -> list[str]:
    """The columns: what they train on, and how much weight decay acts on the plain network there."""
    lines = []
    for name, arena in found.grid.arenas.items():
        efolds = cell_efolds(found.grid.cells[name][0])
        lines.append(f"{name}: {arena.title}; {efolds:.2g} e-folds of decay (the paper: 33)")
    return lines


def _arena_items(found: Results) -> list[str]:
    return [f"- {line}" for line in _arenas(found)]


def _summary(found: Results, parts: Sequence[Section]) -> tuple[list[str], list[list[str]]]:
    arenas = list(found.grid.arenas)
    rows = [
        [
            part.title,
            part.claim.split(". Measured")[0].removeprefix("The paper: ").rstrip("."),
            *(_verdict(found, part, arena) for arena in arenas),
        ]
        for part in parts
        if part.verdicts
    ]
    return ["claim", "paper", *arenas], rows


def _verdict_table(found: Results, part: Section) -> tuple[list[str], list[list[str]]]:
    return list(part.verdicts), [[_verdict(found, part, arena) for arena in part.verdicts]]


def _verdict(found: Results, part: Section, arena: str) -> str:
    """The word and the effect; "so far" while the arena has runs to go: a peek is not the plan's result."""
    if arena not in part.verdicts:
        return ""
    verdict, to_go = part.verdicts[arena], arena in {run.cell.arena.name for run in found.missing}
    if to_go and not verdict.effect:
        return "not run yet"
    return f"{verdict}{' so far' if to_go else ''}"


def _plain_cells(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return head, [[cell.replace("*", "") for cell in row] for row in rows]


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _about_runs(found: Results) -> list[str]:
    hours = sum(result["seconds"]["cpu"] for result in found.runs.values()) / 3600
    diverged, failed = found.with_status(DIVERGED), found.with_status(FAILED)
    lines = [
        f"{len(list(found))} finished, {len(diverged)} diverged, {len(failed)} failed, {len(found.missing)} planned "
        f"and not run yet; {hours:.1f} core hours in all."
    ]
    lines += [f"Diverged: {result['id']}." for result in diverged]
    lines += [f"Failed: {result['id']}: {result['error']}" for result in failed]
    if found.missing:
        seeds: dict[str, list[str]] = {}
        for run in found.missing:
            seeds.setdefault(f"{run.cell.arena.name}/{run.cell.name}", []).append(str(run.seed))
        cells = [f"{cell} {', '.join(left)}" for cell, left in seeds.items()]
        lines.append(f"Seeds not run yet: {'; '.join(cells)}.")
    return lines


def _run_table(found: Results) -> tuple[list[str], list[list[str]]]:
    head = ["run", "status", "top-1 (%)", "GBR logits", "GBR probs", "core s", "commit"]
    rows = []
    for run in found.grid.runs():
        if run.id not in found.runs:
            continue
        result = found.runs[run.id]
        final = result.get("final", {})
        numbers = [
            "-" if final.get(key) is None else format(final[key], form)
            for key, form in (("top1", ".2f"), ("gbr/logits", ".3g"), ("gbr/probs", ".3g"))
        ]
        commit = result["provenance"]["commit"]
        rows.append([run.id, result["status"], *numbers, f"{result['seconds']['cpu']:.0f}", commit])
    return head, rows


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]


def _plain(figure: Figure) -> dict:
    return {"name": figure.name, "kind": figure.kind, "data": _rounded(figure.data)}


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _insert(text: str, lines: str, readme: str | Path) -> str:
    if BEGIN not in text or END not in text:
        raise ValueError(f"readme: {readme} lacks the lines {BEGIN!r} and {END!r}, between which the verdicts go")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{lines}\n{END}{rest.split(END, 1)[1]}"
