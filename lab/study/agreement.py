"""Whether runs side by side on a GPU agree with the runner's on a CPU, before one stands for the other."""

from __future__ import annotations

import math

from . import results as metrics
from .claims import CLAIMS
from .results import Metric, Results
from .sections import Section
from .statistics import Interval, contrast
from .verdicts import MIN_SEEDS, interval_text

_OF = (metrics.TOP1, metrics.TRAIN_LOSS, metrics.GBR_LOGITS, metrics.FGSM)
# What the two ways may differ by: the paper's effect, since less could not be told apart here anyway.
MARGIN = next(claim.effect for claim in CLAIMS if claim.name == "accuracy")


def agreement_section(results: Results) -> Section:
    """What the difference is, of each measure, and what follows."""
    section = Section(
        "agreement",
        "Do runs side by side on a GPU agree with the runner's on a CPU?",
        "On a CPU, runs that train side by side (lab/side_by_side) end with the numbers of mmengine's runner; a test "
        "proves it. A GPU rounds in another way, and training magnifies rounding. So a GPU trains cells of another "
        "arena again, with the seeds that have run there. The rule, declared before: of each measure the mean over the "
        f"cells of GPU less CPU, by Welch's interval, with at least {MIN_SEEDS} seeds of each cell. Both ways agree if "
        f"the interval of the accuracy contains no difference and lies within {MARGIN:g} points. Unless they agree, no "
        "arena for a GPU stands in the place of another. Contrasts of cells never mix both ways.",
    )
    rows = []
    for arena in _repeating(results):
        for metric in _OF:
            if (found := difference(results, arena, metric)) is not None:
                rows.append([metric.name, arena, str(found.n), interval_text(found, metric), _bound(found, metric)])
    if rows:
        head = ["measured", "arena", "seeds", "GPU against CPU [95 %]", "both ways are within"]
        section.tables.append(("", head, rows))
    section.text = [f"{arena}: {statement(results, arena)}." for arena in _repeating(results)]
    return section


def agree(results: Results) -> bool:
    """Whether all arenas that repeat another one agree with it; False if one has not run."""
    found = [difference(results, arena, metrics.TOP1) for arena in _repeating(results)]
    return bool(found) and all(one is not None and _agrees(one) for one in found)


def statement(results: Results, arena: str) -> str:
    """What is known of one arena that repeats another."""
    found = difference(results, arena, metrics.TOP1)
    if found is None:
        return f"fewer than {MIN_SEEDS} seeds of some cell yet" if results.of_arena(arena) else "not run yet"
    word = "agree" if _agrees(found) else "are not shown to agree"
    return f"both ways of training {word}, accuracy within {_bound(found, metrics.TOP1)} points"


def difference(results: Results, arena: str, metric: Metric) -> Interval | None:
    """Mean over the cells of GPU less CPU, a factor for ratios; None unless all cells have enough seeds."""
    cells = [cell.name for cell in results.grid.cells[arena]]
    sides = ((1, arena), (-1, results.grid.arenas[arena].repeats))
    terms = [(sign / len(cells), results.values(side, c, metric)) for c in cells for sign, side in sides]
    if min(len(values) for _, values in terms) < MIN_SEEDS:
        return None
    return contrast(terms, ratio=metric.as_ratio)


def _repeating(results: Results) -> list[str]:
    return [name for name, arena in results.grid.arenas.items() if arena.repeats]


def _agrees(found: Interval) -> bool:
    return found.low <= 0 <= found.high and max(-found.low, found.high) < MARGIN


def _bound(found: Interval, metric: Metric) -> str:
    if metric.as_ratio:
        return f"x{math.exp(max(abs(math.log(found.low)), abs(math.log(found.high)))):{metric.digits}}"
    return format(max(abs(found.low), abs(found.high)), metric.digits)
