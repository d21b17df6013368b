"""Writes what a study found: a Markdown page, figures, a self-contained HTML page, and the README's lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from .. import _page, _plot
from .claims import NOT_RUN, Comparison, Figure, Section, sections
from .execute import DIVERGED, FAILED
from .grid import load_grid
from .results import Results, load_results

BEGIN, END = "<!-- study: written by tools/report.py -->", "<!-- end of study -->"
_ENC = ("enc-ws", "baseline")
# What the README shows of a section: two cells and a metric (its name up to a comma), and what to call the effect.
_HEADLINES = {
    "accuracy": {(_ENC, "top-1 accuracy (%)"): "top-1 (points)"},
    "gbr": {(_ENC, "GBR of the logits"): "of logits", (_ENC, "GBR of the probabilities"): "of probabilities"},
    "robustness": {(_ENC, "top-1 accuracy (%) under FGSM"): "top-1 under FGSM (points, mean over eps)"},
    "tightness": {(_ENC, "AM-GM slack of the folded linear maps (log)"): "slack of the folded linear maps (log)"},
    "parts": {
        (("bn", "baseline"), "top-1 accuracy (%)"): "classifier BN alone",
        (("enc-wn", "bn"), "top-1 accuracy (%)"): "constraint alone (eq. 21)",
        (("enc-ws", "enc-wn"), "top-1 accuracy (%)"): "removed means (eq. 22 for 21)",
        (("enc-ws", "bn"), "top-1 accuracy (%)"): "all of ENC less classifier BN",
    },
}
_TITLE = "Does ENC do what the paper says?"


def write_study(study: str | Path, readme: str | Path | None = None) -> list[Path]:
    """Write ``README.md``, ``report.html``, ``figures/*.png`` and ``figures.json`` of a study from its results alone.

    The same results give the same files, byte for byte, with the same version of matplotlib; the texts and the numbers
    behind the figures (``figures.json``) do not depend on it.

    Args:
        study: Folder that holds ``grid.py`` and ``results/``, and gets the files.
        readme: The project's README, whose lines between the study's two markers are rewritten; None: leave it alone.

    Returns:
        The files that were written.

    Raises:
        ValueError: If the README lacks the markers, or the results do not fit the grid.
    """
    study = Path(study)
    found = load_results(load_grid(study / "grid.py"), study / "results")
    parts = sections(found)
    figures = [figure for part in parts for figure in part.figures]
    pictures = {figure.name: draw(figure) for figure in figures}
    wanted = {study / "figures" / f"{name}.png": picture for name, picture in pictures.items()}
    texts = {
        study / "figures.json": json.dumps([_plain(figure) for figure in figures], indent=1) + "\n",
        study / "README.md": markdown(found, parts),
        study / "report.html": page(found, parts, pictures),
    }
    if readme is not None:
        lines = headlines(found, parts, os.path.relpath(study, Path(readme).parent))
        texts[Path(readme)] = _insert(Path(readme).read_text(), lines, readme)
    for stale in set(study.glob("figures/*.png")) - set(wanted):
        stale.unlink()
    for path, picture in wanted.items():
        _plot.save(picture, path)
    for path, text in texts.items():
        path.write_text(text)
    return [*texts, *wanted]


def draw(figure: Figure) -> bytes:
    """The figure as a PNG."""
    if figure.kind == "intervals":
        ends = ([math.nan if row[end] is None else row[end] for row in figure.data] for end in ("low", "high"))
        labels = [_plot.shorten(row["label"], 56) for row in figure.data]
        means = [row["mean"] for row in figure.data]
        return _plot.intervals(labels, means, *ends, figure.x_label, reference=figure.reference, width=8.5)
    if figure.kind == "scatter":
        series = [_plot.Series(one["label"], one["x"], one["y"]) for one in figure.data]
        return _plot.scatter(series, figure.x_label, figure.y_label, logx=figure.log_x, logy=figure.log_y)
    series = [one if one is None else _band(one) for one in figure.data]
    return _plot.curves(
        series, figure.x_label, figure.y_label, logx=figure.log_x, logy=figure.log_y, whole_x=True, ylim=figure.y_limits
    )


def _band(curve: dict) -> _plot.Series:
    low, high = ([math.nan if bound is None else bound for bound in curve[end]] for end in ("low", "high"))
    return _plot.Series(curve["label"], curve["x"], curve["mean"], low, high)


def headlines(found: Results, parts: Sequence[Section], folder: str) -> str:
    """The verdicts in five lines, with a figure: what stands in the project's README."""
    by_name = {part.name: part for part in parts}
    to_go = f"{len(found.missing)} planned ones to go" if found.missing else "all that are planned"
    note = (
        f"[The study]({folder}/README.md): {len(list(found))} finished runs, {to_go}. "
        "ENC is eq. 22, against the plain network; differences are paired by seed, with 95 % intervals."
    )
    figures = by_name["accuracy"].figures or by_name["parts"].figures
    pictures = [f"![{figure.caption}]({folder}/figures/{figure.name}.png)" for figure in figures[:1]]
    return "\n".join([note, "", *(_headline(found, by_name[name]) for name in _HEADLINES), "", *pictures])


def _headline(found: Results, part: Section) -> str:
    shown = _HEADLINES[part.name]
    arenas = []
    for arena in dict.fromkeys(c.arena for c in part.comparisons):
        run = [c for c in part.comparisons if c.arena == arena and c.effect is not None]
        named = [
            (label, c)
            for (pair, name), label in shown.items()
            for c in run
            if (c.cell, c.other) == pair and c.metric.name.split(",")[0] == name
        ]
        if named:
            named += _decisive(found, run, [c for _, c in named], part.verdicts.get(arena))
            effects = ", ".join(f"{label} {_effect(c)}" for label, c in named)
            verdict = f" - **{_verdict(found, part, arena)}**" if arena in part.verdicts else ""
            arenas.append(f"{arena}: {effects}{verdict}")
    title = part.title if part.title.endswith("?") else f"{part.title}?"
    return f"- {title} {'; '.join(arenas) or 'Not run yet'}."


def _decisive(
    found: Results, run: Sequence[Comparison], shown: Sequence[Comparison], verdict: str | None
) -> list[tuple[str, Comparison]]:
    """The clearest comparison that has the joint verdict, if none that is shown has: readers see what decides."""
    alike = [c for c in run if c.claimed and c.verdict == verdict]
    if not alike or any(c.verdict == verdict for c in shown):
        return []
    c = min(alike, key=lambda c: c.effect.p_value(c.metric.as_ratio))
    against = "" if (c.cell, c.other) == _ENC else f" against {found.title(c.arena, c.other)}"
    return [(f"{c.metric.name}{against}", c)]


def markdown(found: Results, parts: Sequence[Section]) -> str:
    """The study's page in Markdown."""
    text = [f"# {_TITLE}", "", _INTRODUCTION, "", *(f"- {line}" for line in _arenas(found)), "", _METHOD, ""]
    text += [*_markdown_table(*_summary(found, parts)), ""]
    for part in parts:
        text += [f"## {part.title}", "", f"*The claim.* {part.claim}", ""]
        if part.verdicts:
            text += [f"**Verdict.** {_verdicts(found, part)}", ""]
        for title, head, rows in _tables(found, part):
            text += [*([f"{title}:", ""] if title else []), *_markdown_table(head, rows), ""]
        text += [f"- {line}" for line in part.text] + ([""] if part.text else [])
        for figure in part.figures:
            text += [f"![{figure.caption}](figures/{figure.name}.png)", "", f"*{figure.caption}*", ""]
    text += ["## All runs", ""]
    for line in _about_runs(found):
        text += [line, ""]
    head, rows = _run_table(found)
    rows = [[f"[{row[0]}](results/{row[0]}.json)", *row[1:]] for row in rows]
    text += _markdown_table(head, rows)
    return "\n".join(text) + "\n"


def page(found: Results, parts: Sequence[Section], pictures: dict[str, bytes]) -> str:
    """The same as one HTML page that needs no other file; figures by name."""
    blocks = [_INTRODUCTION.replace("`", ""), _page.items(*_arenas(found)), _METHOD.replace("*", "")]
    blocks.append(_page.section("Verdicts", _page.table(*_summary(found, parts))))
    for part in parts:
        drawn = [
            _page.figure(pictures[figure.name], alt=figure.caption, caption=figure.caption) for figure in part.figures
        ]
        blocks.append(
            _page.section(
                part.title,
                f"The claim. {part.claim}",
                *([_page.note(f"Verdict. {_verdicts(found, part)}")] if part.verdicts else []),
                *(_page.table(head, rows, title) for title, head, rows in _tables(found, part)),
                *([_page.items(*part.text)] if part.text else []),
                *([_page.grid(*drawn)] if drawn else []),
            )
        )
    runs = _page.details("Every run", _page.table(*_run_table(found)))
    blocks.append(_page.section("All runs", *_about_runs(found), runs))
    return _page.render(_TITLE, *blocks)


_INTRODUCTION = (
    "Every number below is computed from the files in `results/`, one a run, each with its config, changes, seed, "
    "commit and versions; `grid.py` declares the runs. `python tools/study.py` carries out what is missing, "
    "`python tools/report.py --study study` writes this page again."
)
_METHOD = (
    "Runs of equal seeds start from the same weights and see the same pictures in the same order; differences are "
    "paired by seed, with 95 % intervals of Student's t, not corrected for their number; where two are compared by "
    "their ratio (x), means are geometric. A claim is *reproduced* if every interval that it is about lies wholly on "
    "the claimed side, *not reproduced* if one lies wholly on the other side, at a level divided by their number (of "
    "many, one does by chance), and *not decided at this scale* otherwise. A verdict is one *so far* while its arena "
    "has runs to go. The networks and schedules are far smaller than the paper's: a verdict is about this scale."
)


def _arenas(found: Results) -> list[str]:
    return [f"{name}: {arena.title} ({arena.config})" for name, arena in found.grid.arenas.items()]


def _summary(found: Results, parts: Sequence[Section]) -> tuple[list[str], list[list[str]]]:
    arenas = list(found.grid.arenas)
    rows = [
        [part.title, *(_verdict(found, part, arena) if arena in part.verdicts else "" for arena in arenas)]
        for part in parts
        if part.verdicts
    ]
    return ["claim", *arenas], rows


def _verdicts(found: Results, part: Section) -> str:
    return "; ".join(f"{arena}: {_verdict(found, part, arena)}" for arena in part.verdicts) + "."


def _verdict(found: Results, part: Section, arena: str) -> str:
    """The verdict; "so far" while the arena has runs to go, so that no peek on the way passes for the plan's result."""
    verdict = part.verdicts[arena]
    if verdict == NOT_RUN or arena not in {run.cell.arena.name for run in found.missing}:
        return verdict
    return f"{verdict.removesuffix(' at this scale')} so far"


def _tables(found: Results, part: Section) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, heads and rows of a section's tables."""
    head, rows = _comparison_table(found, part)
    return ([("", head, rows)] if rows else []) + part.tables


def _comparison_table(found: Results, part: Section) -> tuple[list[str], list[list[str]]]:
    head = ["arena", "A", "B", "measured", "mean A", "mean B", "A against B [95 %]", "seeds", "verdict"]
    rows = []
    for c in part.comparisons:
        if c.effect is None:
            continue
        values = ["-" if v is None else format(v, c.metric.digits) for v in (c.first, c.second)]
        names = [found.title(c.arena, cell) for cell in (c.cell, c.other)]
        verdict = "one seed" if c.effect.n == 1 else c.verdict.removesuffix(" at this scale")
        rows.append([c.arena, *names, c.metric.name, *values, _effect(c), str(c.effect.n), verdict])
    return head, rows


def _effect(c: Comparison) -> str:
    """Difference (``+0.52 [0.10, 0.94]``) or ratio (``x1.30 [1.10, 1.54]``)."""
    sign, form = ("x", ".3g") if c.metric.as_ratio else ("", f"+{c.metric.digits}")
    text = f"{sign}{c.effect.mean:{form}}"
    return f"{text} (one seed)" if c.effect.n == 1 else f"{text} [{c.effect.low:{form}}, {c.effect.high:{form}}]"


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
