"""The sections of a study's page, from the results alone; here those of the paper's claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from enc_plugin.table import two_digits

from . import results as metrics
from .claims import CLAIMS, DECAY_PAPER, DECAY_TITLE, DECAYS, NEEDED_EFOLDS, Claim
from .figures import Figure, claim_curves, decay_curves
from .grid import cell_efolds
from .results import Metric, Results
from .statistics import contrast, rank_correlation
from .verdicts import (
    HOLDS,
    MIN_SEEDS,
    NOT_TESTABLE,
    OPPOSITE,
    UNDECIDED,
    Comparison,
    Terms,
    Verdict,
    compare,
    decide,
    describe_terms,
    effect_text,
    is_planned,
)

Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


@dataclass
class Section:
    """One claim or question: its text, what was measured, and the verdict in each arena that plans its cells."""

    name: str
    title: str
    claim: str
    tables: list[Table] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)


def claim_sections(results: Results) -> list[Section]:
    """A section a claim, in the order of :data:`lab.study.claims.CLAIMS`; the claim about decay last."""
    return [*(_claim(results, claim) for claim in CLAIMS), _decay(results)]


def _claim(results: Results, claim: Claim) -> Section:
    """A claim is one contrast in every arena that plans its cells."""
    section = Section(claim.name, claim.title, f"The paper: {claim.paper}.")
    found = [
        compare(results, arena, claim.asked_in(arena)[0], claim.metric)
        for arena in results.arenas
        if is_planned(results, arena, claim.asked_in(arena)[0])
    ]
    # An arena whose finished runs lack the measure was not measured for this claim.
    found = [c for c in found if c.effect is not None or not all(results.of_cell(c.arena, x) for _, x in c.terms)]
    words = [decide(c.effect, claim.asked_in(c.arena)[1], claim.metric.as_ratio) for c in found]
    section.verdicts = {
        c.arena: Verdict(word, effect_text(c), c.arena in results.unfinished)
        for c, word in zip(found, words, strict=True)
    }
    section.tables += contrast_table(results, found, words=[verdict.shown for verdict in section.verdicts.values()])
    section.tables += contrast_table(results, found_contrasts(results, claim.beside), "Beside it")
    if claim.curve:
        section.figures = [figure for arena in results.arenas for figure in claim_curves(results, claim, arena)]
    return section


def _decay(results: Results) -> Section:
    """Judged by the order of all runs: a claim about a trend, where one contrast would take the ends alone."""
    section = Section("decay", DECAY_TITLE, f"The paper: {DECAY_PAPER}.")
    for arena, decays in DECAYS.items():
        if arena not in results.arenas:
            continue
        efolds = {cell.name: cell_efolds(cell) for cell in results.grid.cells[arena] if cell.name in decays}
        points, rows, largest = [], [], 0.0
        for cell, decay in decays.items():
            values = [v for v in results.values(arena, cell, metrics.GBR_LOGITS) if v > 0]
            if len(values) >= MIN_SEEDS:
                points += [(decay, value) for value in values]
                largest = max(largest, efolds[cell])
            if values:
                columns = [metrics.GBR_LOGITS, metrics.GBR_MARGIN, metrics.FREE_NORM, metrics.TOP1, metrics.TRAIN_LOSS]
                means = _means(results, arena, cell, columns)
                rows.append([f"{decay:g}", two_digits(efolds[cell]), str(len(values)), *means])
        rho, p = rank_correlation(*zip(*points, strict=True)) if points else (math.nan, math.nan)
        to_go = arena in results.unfinished
        section.verdicts[arena] = _trend(rho, p, len(points), largest, to_go)
        head = ["lambda", "e-folds", "seeds", "GBR of the logits", "over squared margin", "||W||^2", "top-1 (%)"]
        if rows:
            section.tables.append((results.grid.arenas[arena].title, [*head, "training loss"], rows))
        section.figures += decay_curves(results, arena, tuple(decays))
    found = [[arena, f"{verdict.shown} {verdict.effect}".rstrip()] for arena, verdict in section.verdicts.items()]
    section.tables.insert(0, ("Rank correlation of lambda and GBR", ["arena", "result"], found))
    section.text.append(
        "Spearman's rank correlation of lambda and GBR over all runs of each lambda that has at least "
        f"{MIN_SEEDS} seeds, p from permutations. E-folds say how much decay acts (docs/gauge.md): below 1 at the "
        "largest of these lambdas the claim is not testable."
    )
    return section


def _trend(rho: float, p: float, runs: int, efolds: float, to_go: bool) -> Verdict:
    """The word for a rank correlation of decay and GBR, which the claim says is negative."""
    if math.isnan(rho):
        return Verdict(NOT_TESTABLE, to_go=to_go)
    word = UNDECIDED if p >= 0.05 else HOLDS if rho < 0 else OPPOSITE
    if efolds < NEEDED_EFOLDS:
        word = NOT_TESTABLE
    return Verdict(word, f"rho {rho:+.2f} (p {p:.2g}, {runs} runs, e-folds up to {two_digits(efolds)})", to_go)


def found_contrasts(results: Results, wanted: Sequence[tuple[Terms, Metric]]) -> list[Comparison]:
    """The contrasts that have an estimate, arena by arena."""
    found = [
        compare(results, arena, terms, metric)
        for arena in results.arenas
        for terms, metric in wanted
        if is_planned(results, arena, terms)
    ]
    return [comparison for comparison in found if comparison.effect is not None]


def contrast_table(
    results: Results, found: Sequence[Comparison], title: str = "", words: Sequence[str] | None = None
) -> list[Table]:
    """Contrasts as a table, none if there is none; means of the cells where a side has one.

    A single metric is named in the table's title, several in a column. ``words``: the results; None: what is seen.
    """
    names = list(dict.fromkeys(c.metric.name for c in found))
    rows = []
    for c, word in zip(found, words or [c.seen for c in found], strict=True):
        first, second = describe_terms(results, c.arena, c.terms)
        means = [""] * 2
        if len(c.terms) == 2:
            means = ["-" if mean is None else format(mean, c.metric.digits) for mean in c.means]
        seeds = str(c.effect.n) if c.effect else "0"
        measured = [c.metric.name] if len(names) > 1 else []
        rows.append([c.arena, first, second, *measured, effect_text(c), word, *means, seeds])
    measured = ["measured"] if len(names) > 1 else []
    head = ["arena", "A", "B", *measured, "A against B [95 %]", "result", "mean A", "mean B", "seeds"]
    if len(names) == 1:
        title = f"{title}: {names[0]}" if title else names[0]
    return [(title, head, rows)] if rows else []


def _means(results: Results, arena: str, cell: str, of: Sequence[Metric]) -> list[str]:
    texts = []
    for metric in of:
        values = results.values(arena, cell, metric)
        texts.append(format(contrast([(1, values)], metric.as_ratio).mean, metric.digits) if values else "-")
    return texts
