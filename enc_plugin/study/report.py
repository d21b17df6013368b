"""Writes what a study found: a Markdown page, figures, a self-contained HTML page, and the README's lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from .claims import Comparison, Figure, Section, sections
from .grid import load_grid
from .results import Results, load_results

BEGIN, END = "<!-- study: written by tools/report.py -->", "<!-- end of study -->"
_HEADLINES = ("accuracy", "gbr", "robustness", "tightness", "parts")


def write_study(grid: str | Path, results: str | Path, out: str | Path, readme: str | Path | None = None) -> list[Path]:
    """Write ``README.md``, ``report.html``, ``figures/*.png`` and ``figures.json`` of a study from its results alone.

    The same results give the same files, byte for byte, with the same versions of matplotlib and its fonts; the numbers
    behind the figures (``figures.json``) do not depend on them.

    Args:
        grid: The grid's file.
        results: Folder of the results.
        out: Folder to write to.
        readme: The project's README, whose lines between the study's two markers are rewritten; None: leave it alone.

    Returns:
        The files that were written.

    Raises:
        ValueError: If the README lacks the markers, or the results do not fit the grid.
    """
    found = load_results(load_grid(grid), results)
    parts = sections(found)
    out = Path(out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    figures = [figure for part in parts for figure in part.figures]
    pictures = {figure.name: draw(figure) for figure in figures}
    wanted = {out / "figures" / f"{name}.png": picture for name, picture in pictures.items()}
    for stale in set((out / "figures").glob("*.png")) - set(wanted):
        stale.unlink()
    for path, picture in wanted.items():
        path.write_bytes(picture)
    link = os.path.relpath(results, out)
    texts = {
        out / "figures.json": json.dumps([_plain(figure) for figure in figures], indent=1) + "\n",
        out / "README.md": markdown(found, parts, link),
        out / "report.html": page(found, parts, pictures, link),
    }
    if readme is not None:
        texts[Path(readme)] = _insert(
            Path(readme).read_text(), headlines(found, parts, out, Path(readme).parent), readme
        )
    for path, text in texts.items():
        path.write_text(text)
    return [*texts, *wanted]


def headlines(found: Results, parts: Sequence[Section], out: Path, start: Path) -> str:
    """The verdicts in five lines, with a figure: what stands in the project's README."""
    by_name = {part.name: part for part in parts}
    folder = os.path.relpath(out, start)
    lines = [_headline(found, by_name[name]) for name in _HEADLINES]
    pictures = [
        f"![{figure.caption}]({folder}/figures/{figure.name}.png)"
        for name in ("parts", "accuracy")
        for figure in by_name[name].figures[:1]
    ]
    done = sum(1 for _ in found)
    note = (
        f"[The study]({folder}/README.md): {done} finished runs, {len(found.missing)} planned ones to go; paired by seed, "
        "95 % intervals."
    )
    return "\n".join([note, "", *lines, "", *pictures[:1]])


def _headline(found: Results, part: Section) -> str:
    cells = []
    for arena in part.verdicts or {c.arena: "" for c in part.comparisons}:
        first = next((c for c in part.comparisons if c.arena == arena and c.effect is not None), None)
        if first is None:
            continue
        verdict = part.verdicts.get(arena)
        cells.append(f"{arena}: {_effect(first)}" + (f" - **{verdict}**" if verdict else ""))
    return f"- **{part.title}** {'; '.join(cells) or 'no run yet'}"


def markdown(found: Results, parts: Sequence[Section], link: str) -> str:
    """The study's page in Markdown."""
    text = ["# Does ENC do what the paper says?", "", *_introduction(found), ""]
    text += _markdown_table(*_summary(found, parts)) + [""]
    for part in parts:
        text += [f"## {part.title}", "", f"*The claim.* {part.claim}", ""]
        if part.verdicts:
            text += [f"**{line}**  " for line in _verdicts(found, part)] + [""]
        if part.comparisons:
            text += _markdown_table(*_comparison_table(found, part)) + [""]
        for title, head, rows in part.tables:
            text += [f"{title}:", "", *_markdown_table(head, rows), ""]
        for line in part.text:
            text += [f"- {line}"]
        text += [""] if part.text else []
        for figure in part.figures:
            text += [f"![{figure.caption}](figures/{figure.name}.png)", "", f"*{figure.caption}*", ""]
    text += ["## All runs", "", *_about_runs(found), ""]
    head, rows, paths = _run_table(found)
    rows = [[f"[{row[0]}]({link}/{path})", *row[1:]] for row, path in zip(rows, paths, strict=True)]
    text += _markdown_table(head, rows)
    return "\n".join(text) + "\n"


def _introduction(found: Results) -> list[str]:
    arenas = [
        f"- **{name}**: {arena.title} ([config]({os.path.basename(arena.config)}))"
        for name, arena in found.grid.arenas.items()
    ]
    return [
        "Every number below is computed from the files in [results](results), one a run, each with its config, changes, "
        "seed, commit and versions; [grid.py](grid.py) declares the runs. `python tools/study.py` carries out what is "
        "missing, `python tools/report.py --study study` writes this page again.",
        "",
        *arenas,
        "",
        "Runs of equal seeds start from the same weights and see the same pictures in the same order; differences are "
        "paired by seed, with 95 % intervals of Student's t, not corrected for their number. A claim is *reproduced* if "
        "every interval that it is about lies wholly on the claimed side, *not reproduced* if one lies wholly on the "
        "other side, and *not decided at this scale* otherwise. The networks and schedules here are far smaller than the "
        "paper's: a verdict is about this scale.",
    ]


def _summary(found: Results, parts: Sequence[Section]) -> tuple[list[str], list[list[str]]]:
    arenas = list(found.grid.arenas)
    rows = [[part.title, *(part.verdicts.get(arena, "") for arena in arenas)] for part in parts if part.verdicts]
    return ["claim", *arenas], rows


def _verdicts(found: Results, part: Section) -> list[str]:
    return [f"{found.grid.arenas[arena].title}: {verdict}." for arena, verdict in part.verdicts.items()]


def _comparison_table(found: Results, part: Section) -> tuple[list[str], list[list[str]]]:
    head = ["arena", "first", "second", "measured", "first", "second", "effect [95 %]", "seeds", "verdict"]
    rows = []
    for c in part.comparisons:
        values = ["-" if v is None else format(v, c.metric.digits) for v in (c.first, c.second)]
        names = [found.title(c.arena, cell) for cell in (c.cell, c.other)]
        seeds = "0" if c.effect is None else str(c.effect.n)
        verdict = "no run yet" if c.effect is None else "one seed" if c.effect.n == 1 else c.verdict
        rows.append([c.arena, *names, c.metric.name, *values, _effect(c), seeds, verdict])
    return head, rows


def _effect(c: Comparison) -> str:
    """Difference (``+0.52 [0.10, 0.94]``) or ratio (``x1.30 [1.10, 1.54]``)."""
    if c.effect is None:
        return "-"
    sign, form = ("x", ".3g") if c.metric.as_ratio else ("", f"+{c.metric.digits}")
    text = f"{sign}{c.effect.mean:{form}}"
    return text if c.effect.n == 1 else f"{text} [{c.effect.low:{form}}, {c.effect.high:{form}}]"


def _about_runs(found: Results) -> list[str]:
    done = list(found)
    hours = sum(result["seconds"]["cpu"] for result in found.runs.values()) / 3600
    lines = [
        f"{len(done)} finished, {len(found.with_status('diverged'))} diverged, {len(found.with_status('failed'))} failed, "
        f"{len(found.missing)} planned and not run yet; {hours:.1f} core hours in all."
    ]
    for status in ("diverged", "failed"):
        for result in found.with_status(status):
            lines.append(f"{status}: {result['id']}" + (f" ({result['error']})" if "error" in result else ""))
    if found.missing:
        lines.append(f"Not run yet: {', '.join(found.missing)}.")
    return [item for line in lines for item in (line, "")][:-1]


def _run_table(found: Results) -> tuple[list[str], list[list[str]], list[str]]:
    head = ["run", "status", "top-1 (%)", "GBR logits", "GBR probs", "core s", "commit"]
    rows, paths = [], []
    for run in found.grid.runs():
        result = found.runs.get(run.id)
        if result is None:
            continue
        final = result.get("final", {})
        numbers = [
            "-" if final.get(key) is None else format(final[key], form)
            for key, form in (("top1", ".2f"), ("gbr/logits", ".3g"), ("gbr/probs", ".3g"))
        ]
        commit = result["provenance"]["commit"]
        rows.append([run.id, result["status"], *numbers, f"{result['seconds']['cpu']:.0f}", commit])
        paths.append(f"{run.id}.json")
    return head, rows, paths


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
