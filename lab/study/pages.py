"""Writes what a study found: a Markdown page, figures, a self-contained HTML page, and the README's lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from enc_plugin.reports import page, plot

from .answer import METHOD, WORDS, arena_lines, headlines, markdown_table, opening_figure, summary_table
from .drawing import to_picture
from .execute import DIVERGED, FAILED, as_json, runs_folder
from .figures import Figure
from .grid import CELLS, load_grid
from .questions import question_sections
from .results import Results, load_results
from .sections import Section, claim_sections

BEGIN, END = "<!-- study: written by python -m lab.study --pages -->", "<!-- end of study -->"
_TITLE = "Does ENC do what the paper says?"
_RUNS = "All runs"
_INTRODUCTION = (
    "Every number below is computed from the files in `runs/`, one a run, each with its config, changes, seed, "
    "commit and versions; `lab/study/cells.py` declares the runs. `python -m lab.study` carries out what is missing, "
    "`python -m lab.study --pages` writes this page again."
)


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
    parts = all_sections(found)
    figures = [figure for part in parts for figure in part.figures]
    texts = {}
    if readme is not None:  # before anything is written: one without the markers is refused
        lines = headlines(found, parts)
        texts[Path(readme)] = _insert(Path(readme).read_text(), lines, readme)
    pictures = {figure.name: to_picture(figure) for figure in figures}
    wanted = {study / "figures" / f"{name}.png": picture for name, picture in pictures.items()}
    plain = [{"name": figure.name, "kind": figure.kind, "data": figure.data} for figure in figures]
    texts |= {
        study / "figures.json": json.dumps(as_json(plain), indent=1) + "\n",
        study / "README.md": markdown(found, parts),
        study / "report.html": _html(found, parts, pictures),
    }
    for stale in set(study.glob("figures/*.png")) - set(wanted):
        stale.unlink()
    for path, picture in wanted.items():
        plot.save(picture, path)
    for path, text in texts.items():
        path.write_text(text)
    return [*texts, *wanted]


def all_sections(found: Results) -> list[Section]:
    """All sections of the page, in order."""
    return [*claim_sections(found), *question_sections(found)]


def markdown(found: Results, parts: Sequence[Section]) -> str:
    """The study's page in Markdown: the answer first, then a section a claim."""
    opening = opening_figure(parts)
    text = [f"# {_TITLE}", "", *markdown_table(*summary_table(found, parts)), ""]
    text += [WORDS, "", *[f"- {line}" for line in arena_lines(found)], "", *_markdown_figures(opening)]
    text += ["Contents:", ""]
    text += [f"- [{title}](#{page.anchor(title)})" for title in (*(part.title for part in parts), _RUNS)]
    text += ["", METHOD, "", _INTRODUCTION, ""]
    for part in parts:
        text += [f"## {part.title}", "", part.claim, ""]
        for title, head, rows in part.tables:
            text += [*([f"{title}:", ""] if title else []), *markdown_table(head, rows), ""]
        text += [f"- {line}" for line in part.text] + ([""] if part.text else [])
        text += _markdown_figures(figure for figure in part.figures if figure not in opening)
    text += [f"## {_RUNS}", ""]
    for line in _about_runs(found):
        text += [line, ""]
    head, rows = _run_table(found)
    rows = [[f"[{row[0]}](runs/{row[0]}.json)", *row[1:]] for row in rows]
    text += markdown_table(head, rows)
    return "\n".join(text) + "\n"


def _markdown_figures(figures: Iterable[Figure]) -> list[str]:
    return [
        line
        for figure in figures
        for line in (f"![{figure.caption}](figures/{figure.name}.png)", "", f"*{figure.caption}*", "")
    ]


def _html(found: Results, parts: Sequence[Section], pictures: dict[str, bytes]) -> str:
    """The same as one HTML page that needs no other file; figures by name."""

    def drawn(figures: Iterable[Figure]) -> list:
        return [page.figure(plot.smaller(pictures[one.name]), one.caption, one.caption) for one in figures]

    opening = opening_figure(parts)
    head, rows = summary_table(found, parts)
    blocks: list[str] = [page.table(head, [[cell.replace("*", "") for cell in row] for row in rows])]
    blocks.append(WORDS.replace("*", ""))
    blocks += [page.items(*arena_lines(found)), *drawn(opening)]
    blocks += ["Contents:", page.contents(*(part.title for part in parts), _RUNS)]
    blocks += [METHOD, _INTRODUCTION.replace("`", "")]
    for part in parts:
        figures = drawn(figure for figure in part.figures if figure not in opening)
        blocks.append(
            page.section(
                part.title,
                part.claim,
                *(page.table(head, rows, title) for title, head, rows in part.tables),
                *([page.items(*part.text)] if part.text else []),
                *([page.grid(*figures)] if figures else []),
            )
        )
    runs = page.details("Every run", page.table(*_run_table(found)))
    blocks.append(page.section(_RUNS, *_about_runs(found), runs))
    return page.render(_TITLE, *blocks)


def _about_runs(found: Results) -> list[str]:
    hours = sum(result["seconds"]["cpu"] for result in found.runs.values()) / 3600
    diverged, failed = found.with_status(DIVERGED), found.with_status(FAILED)
    lines = [
        f"{len(list(found))} finished, {len(diverged)} diverged, {len(failed)} failed, {len(found.missing)} planned "
        f"and not run yet; {hours:.1f} core hours in all."
    ]
    lines += [f"Diverged: {result['id']}." for result in diverged]
    lines += [f"Failed: {result['id']}: {result['error']}" for result in failed]
    flushed = [id for id, result in found.runs.items() if result["provenance"].get("denormals") == "flushed"]
    if flushed:
        lines.append(
            f"Run with numbers below 1e-38 flushed to zero: {', '.join(flushed)}. Decay drives layers of these runs to "
            "zero, and some processors compute with such numbers up to 30 times slower. Others on a CPU kept them."
        )
    left = [run for run in found.missing if not run.cell.arena.for_gpu]
    for_gpu = Counter(run.cell.arena.name for run in found.missing if run.cell.arena.for_gpu)
    if for_gpu:
        counts = ", ".join(f"{count} of {arena}" for arena, count in for_gpu.items())
        lines.append(f"Runs for a GPU that are not run yet: {counts}.")
    if left:
        seeds: dict[str, list[str]] = {}
        for run in left:
            seeds.setdefault(run.cell.id, []).append(str(run.seed))
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


def _insert(text: str, lines: str, readme: str | Path) -> str:
    if BEGIN not in text or END not in text:
        raise ValueError(f"readme: {readme} lacks the lines {BEGIN!r} and {END!r}, between which the verdicts go")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{lines}\n{END}{rest.split(END, 1)[1]}"
