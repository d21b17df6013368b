"""What a study says of a claim: one contrast of cells in one arena, one effect with its interval, one word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .results import Metric, Results
from .statistics import Interval, contrast

HOLDS, OPPOSITE, ABSENT, UNDECIDED, NOT_TESTABLE = "holds", "opposite", "absent", "undecided", "not testable"
MIN_SEEDS = 3  # of each cell, below which there is no verdict

MEANING = {
    HOLDS: "the interval lies wholly on the claimed side of zero (of 1 for ratios, x)",
    OPPOSITE: "it lies wholly on the other side",
    ABSENT: "it contains zero, and excludes the effect that the paper reports",
    UNDECIDED: "it contains both",
    NOT_TESTABLE: f"a cell has fewer than {MIN_SEEDS} seeds, or the arena lacks what the claim is about",
}

Terms = tuple[tuple[float, str], ...]  # weight and cell


@dataclass(frozen=True)
class Verdict:
    """The word for a claim in one arena, and the estimate that it goes by, as text.

    Attributes:
        to_go: Whether the arena has runs to go. The word is then one "so far": a peek is not the plan's result.
    """

    word: str
    effect: str = ""
    to_go: bool = False

    @property
    def shown(self) -> str:
        """The word as tables show it."""
        if self.to_go:
            return f"{self.word} so far" if self.effect else "not run yet"
        return self.word

    def __str__(self) -> str:
        """Word and effect, without a mark for runs to go, which the head of a column shows."""
        if self.to_go and not self.effect:
            return self.shown
        return f"**{self.word}** {self.effect}".rstrip()


@dataclass(frozen=True)
class Comparison:
    """A contrast of cells of an arena by one metric.

    Attributes:
        terms: Weights and cells.
        means: Of each term's cell, geometric for metrics that compare by ratio.
        effect: The contrast with its 95 % interval; None if a cell has not run.
    """

    arena: str
    terms: Terms
    metric: Metric
    means: tuple[float | None, ...]
    effect: Interval | None

    @property
    def seen(self) -> str:
        """Whether a difference is seen, for questions without a claim."""
        if self.effect is None:
            return "not run yet"
        if self.effect.n < MIN_SEEDS or math.isnan(self.effect.low):
            return "one seed" if self.effect.n == 1 else f"{self.effect.n} seeds"
        none = 1.0 if self.metric.as_ratio else 0.0
        return {1: "larger", -1: "smaller", 0: "no difference seen"}[
            (self.effect.low > none) - (self.effect.high < none)
        ]


def is_planned(results: Results, arena: str, terms: Terms) -> bool:
    """Whether the grid has all cells of a contrast in this arena."""
    return {cell for _, cell in terms} <= {cell.name for cell in results.grid.cells.get(arena, [])}


def compare(results: Results, arena: str, terms: Terms, metric: Metric) -> Comparison:
    """The contrast ``sum of weight * mean of cell`` in one arena, from all finished runs in which it was measured."""
    cells = [results.values(arena, cell, metric) for _, cell in terms]
    if metric.as_ratio:
        cells = [[value for value in values if value > 0] for values in cells]
    means = tuple(contrast([(1, values)], metric.as_ratio).mean if values else None for values in cells)
    effect = None
    if all(cells):
        effect = contrast([(weight, v) for (weight, _), v in zip(terms, cells, strict=True)], metric.as_ratio)
    return Comparison(arena, terms, metric, means, effect)


def decide(found: Interval | None, effect: float, ratio: bool = False) -> str:
    """The word for an estimate, given the paper's effect: see :data:`MEANING`.

    Args:
        found: The estimate; None or NaN bounds where there is none.
        effect: The paper's effect, not 0 (as a ratio: positive, not 1).
        ratio: Whether both are factors.
    """
    if found is None or found.n < MIN_SEEDS or math.isnan(found.low):
        return NOT_TESTABLE
    low, high = found.low, found.high
    if ratio:
        low, high, effect = math.log(low), math.log(high), math.log(effect)
    if effect < 0:
        low, high, effect = -high, -low, -effect
    if low > 0:
        return HOLDS
    if high < 0:
        return OPPOSITE
    return ABSENT if high < effect else UNDECIDED


def effect_text(comparison: Comparison) -> str:
    """Difference (``+0.52 [+0.10, +0.94]``) or ratio (``x1.30 [1.10, 1.54]``)."""
    return "" if comparison.effect is None else interval_text(comparison.effect, comparison.metric)


def interval_text(found: Interval, metric: Metric) -> str:
    """The same of an estimate by itself."""
    sign, form = ("x", ".3g") if metric.as_ratio else ("", f"+{metric.digits}")
    text = f"{sign}{found.mean:{form}}"
    return f"{text} (one seed)" if found.n == 1 else f"{text} [{found.low:{form}}, {found.high:{form}}]"


def describe_terms(results: Results, arena: str, terms: Sequence[tuple[float, str]]) -> tuple[str, str]:
    """The cells on the positive and on the negative side, by title."""
    return tuple(
        ", ".join(results.title(arena, cell) for weight, cell in terms if weight * side > 0) for side in (1, -1)
    )
