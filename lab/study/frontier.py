"""What a user who wants robustness should take: clean accuracy against accuracy under PGD-10, method by method."""

from __future__ import annotations

from . import results as metrics
from .figures import Figure
from .results import Results, read_together
from .sections import Section
from .statistics import interval
from .verdicts import MIN_SEEDS, compare

ARENA = "g4"
_METHODS = {"plain": "plain", "wd": "more decay", "noise": "input noise", "penalty": "GBR penalty", "enc": "ENC"}


def frontier_section(results: Results) -> Section:
    """Every method at every strength, and which of them are beaten."""
    section = Section(
        "frontier",
        "Which method is worth its clean accuracy, if robustness is wanted?",
        "More decay, Gaussian noise on the inputs, the GBR penalty and ENC, at three strengths each. The rule, "
        "declared before the runs: a cell is beaten if another one has a higher clean accuracy and a higher accuracy "
        f"under PGD-10, both by Welch's interval with at least {MIN_SEEDS} seeds on both sides. What is not beaten is "
        "left to choose from.",
    )
    cells = [cell for cell in results.grid.cells.get(ARENA, ()) if results.of_cell(ARENA, cell.name)]
    rows = []
    for cell in cells:
        values = [results.values(ARENA, cell.name, metric) for metric in (metrics.TOP1, metrics.PGD)]
        means = [f"{interval(v).mean:.2f}" if v else "-" for v in values]
        beaten_by = [other.title for other in cells if beats(results, other.name, cell.name)]
        rows.append([cell.title, str(len(values[0])), *means, ", ".join(beaten_by) or "none"])
    if rows:
        head = ["method", "seeds", "top-1 (%)", "top-1 under PGD-10 (%)", "beaten by"]
        section.tables.append((results.grid.arenas[ARENA].title, head, rows))
        section.figures = [_figure(results)]
    return section


def beats(results: Results, cell: str, other: str) -> bool:
    """Whether a cell is better in both by their intervals."""
    found = [compare(results, ARENA, ((1, cell), (-1, other)), metric).effect for metric in (metrics.TOP1, metrics.PGD)]
    return all(effect is not None and effect.n >= MIN_SEEDS and effect.low > 0 for effect in found)


def _figure(results: Results) -> Figure:
    series = []
    for prefix, label in _METHODS.items():
        runs = [run for run in results.of_arena(ARENA) if run["cell"].startswith(prefix)]
        points = read_together(runs, metrics.TOP1, metrics.PGD)
        x, y = zip(*points, strict=True) if points else ((), ())
        series.append({"label": label, "x": [*x], "y": [*y]})
    caption = f"Clean accuracy against accuracy under PGD-10, every run, {results.grid.arenas[ARENA].title}."
    return Figure(f"frontier_{ARENA}", "scatter", caption, metrics.TOP1.name, metrics.PGD.name, series)
