"""The sections of questions that the paper does not ask: what each part of ENC does, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import results as metrics
from .agreement import agreement_section
from .claims import ENC, PARTS, PLAIN
from .figures import cells_by_class, scatters
from .frontier import frontier_section
from .grid import GAUGES
from .projection_rule import projection_section
from .results import Metric, Results, read_together
from .sections import Section, contrast_table, found_contrasts
from .statistics import (
    Interval,
    contrast,
    homogeneity,
    interval,
    partial_rank_correlation,
    rank_correlation,
)
from .verdicts import Comparison, compare, effect_text, is_planned


def question_sections(results: Results) -> list[Section]:
    """A section a question, in order."""
    questions = (_classes, _parts, _gbr_and_accuracy, _learning_rates, _rival, projection_section, frontier_section)
    questions += (_cost, agreement_section)
    return [question(results) for question in questions]


def _classes(results: Results) -> Section:
    section = Section(
        "classes",
        "Which part does the work, by class?",
        "Given batch norm, cells of one class train alike (docs/gauge.md), so a class is one method with many runs. "
        "ENC's effect is that of removed row means and of the classifier's batch norm. Cells without a class differ in "
        "decay, learning rate, augmentation or loss.",
    )
    for arena in results.arenas:
        members = {gauge: _members(results, arena, gauge) for gauge in GAUGES}
        rows = [_class_row(gauge, cells) for gauge, cells in members.items() if cells]
        head = ["class", "cells", "runs", "top-1 (%)", "95 % interval", "p that its cells are alike"]
        if rows:
            section.tables.append((results.grid.arenas[arena].title, head, rows))
        kept, kept_bn, removed, removed_bn = (sum(cells.values(), []) for cells in members.values())
        for what, one, other in (
            ("removed means, with the classifier's batch norm", removed_bn, kept_bn),
            ("removed means, without it", removed, kept),
            ("the classifier's batch norm, means removed", removed_bn, removed),
            ("the classifier's batch norm, means kept", kept_bn, kept),
        ):
            if one and other:
                effect = contrast([(1, one), (-1, other)])
                comparison = Comparison(arena, (), metrics.TOP1, (), effect)
                section.text.append(f"{arena}: {what}: {effect_text(comparison)} points, {comparison.seen}.")
        section.figures += cells_by_class(results, arena)
    return section


def _members(results: Results, arena: str, gauge: str) -> dict[str, list[float]]:
    """Accuracies of the cells of a class that have run, by title."""
    cells = [cell for cell in results.grid.cells[arena] if cell.gauge == gauge]
    found = {cell.title: results.values(arena, cell.name, metrics.TOP1) for cell in cells}
    return {title: values for title, values in found.items() if values}


def _class_row(gauge: str, cells: dict[str, list[float]]) -> list[str]:
    pooled, p = sum(cells.values(), []), homogeneity(list(cells.values()))
    alike = "" if math.isnan(p) else f"{p:.2g}"
    return [gauge, ", ".join(cells), str(len(pooled)), *_cells(interval(pooled), metrics.TOP1), alike]


def _parts(results: Results) -> Section:
    section = Section(
        "parts",
        "Which part does the work, cell by cell?",
        "ENC changes several things at once. The paper does not test them one by one; these tables do.",
    )
    for arena in results.arenas:
        rows = []
        for what, terms in PARTS:
            if not is_planned(results, arena, terms):
                continue
            found = [compare(results, arena, terms, m) for m in (metrics.TOP1, metrics.GBR_LOGITS, metrics.FGSM)]
            if found[0].effect is not None:
                rows.append([what, str(found[0].effect.n), *(effect_text(c) for c in found), found[0].seen])
        if rows:
            head = ["part", "seeds", "top-1 (points)", "GBR of the logits", "FGSM (points)", "top-1"]
            section.tables.append((results.grid.arenas[arena].title, head, rows))
    return section


def _gbr_and_accuracy(results: Results) -> Section:
    section = Section(
        "correlations",
        "Does a smaller GBR go with better generalization?",
        "Theorems 1 and 2 bound the gap between expected and empirical loss by the GBR. Rank correlations over all "
        "finished runs of an arena. p is from a permutation test, which assumes independent runs; the runs of one cell "
        "are not, so the true p is larger. GBR, gap and accuracy all change as a run is trained further; the partial "
        "correlation compares runs as if their training losses were equal.",
        text=_without_norms(results),
    )
    quantities = (
        metrics.TOP1,
        metrics.GAP,
        metrics.TRAIN_LOSS,
        metrics.FREE_NORM,
        metrics.LOG_PRODUCT,
        metrics.RESIDUAL_BOUND,
    )
    for arena in results.arenas:
        runs = results.of_arena(arena)
        rows = [
            row
            for gbr in (metrics.GBR_LOGITS, metrics.GBR_MARGIN, metrics.GBR_PROBS)
            for other in quantities
            if (row := _correlation(runs, gbr, other))
        ]
        if rows:
            head = ["GBR", "with", "Spearman's rho", "p", "rho at equal training loss", "p", "runs"]
            section.tables.append((results.grid.arenas[arena].title, head, rows))
        if arena != "digits":
            section.figures += scatters(results, arena)
    return section


def _without_norms(results: Results) -> list[str]:
    """One line about the finished runs without folded norms, none if all have them."""
    runs = [run for run in results if metrics.LOG_PRODUCT.read(run) is None]
    if not runs:
        return []
    titles = sorted({results.title(run["arena"], run["cell"]) for run in runs})
    return [
        f"{len(runs)} runs ({', '.join(titles)}) have no folded norms, because these were read from weights that the "
        "networks do not compute with; rows of norms leave them out."
    ]


def _correlation(runs: Sequence[dict], gbr: Metric, other: Metric) -> list[str]:
    """A row of the table: rank correlation, plain and at equal training loss; empty where there is none."""
    triples = read_together(runs, gbr, other, metrics.TRAIN_LOSS)
    x, y, loss = zip(*triples, strict=True) if triples else ((), (), ())
    rho, p = rank_correlation(x, y)
    if math.isnan(rho):
        return []
    at_equal_loss = partial_rank_correlation(x, y, loss)
    left = ["", ""] if math.isnan(at_equal_loss[0]) else [f"{at_equal_loss[0]:+.2f}", f"{at_equal_loss[1]:.2g}"]
    return [gbr.name, other.name, f"{rho:+.2f}", f"{p:.2g}", *left, str(len(triples))]


def _learning_rates(results: Results) -> Section:
    section = Section(
        "learning-rates",
        "Would another learning rate change the answer?",
        "The paper trains both at 0.1, which may suit one of them better. Each side is trained at 0.03, 0.1 and 0.3, "
        "and the best of one is compared with the best of the other. That choice makes the interval too narrow.",
    )
    arena, rates = "quarter", {"lr0.03": 0.03, "": 0.1, "lr0.3": 0.3}
    best: dict[str, tuple[float, str]] = {}
    rows = []
    for side, base in (("plain", PLAIN), ("ENC", ENC)):
        for suffix, rate in rates.items():
            cell = base if not suffix else suffix if side == "plain" else f"{ENC}-{suffix}"
            values = results.values(arena, cell, metrics.TOP1)
            if not values:
                continue
            found = interval(values)
            rows.append([side, f"{rate:g}", str(found.n), *_cells(found, metrics.TOP1)])
            best[side] = max(best.get(side, (-math.inf, "")), (found.mean, cell))
    if rows:
        head = ["side", "lr", "seeds", "top-1 (%)", "95 % interval"]
        section.tables.append((results.grid.arenas[arena].title, head, rows))
    if len(rows) == 2 * len(rates):
        found = compare(results, arena, ((1, best["ENC"][1]), (-1, best["plain"][1])), metrics.TOP1)
        section.tables += contrast_table(results, [found])
    return section


def _rival(results: Results) -> Section:
    section = Section(
        "rival",
        "The rival: the GBR itself as a term of the loss",
        "The paper constrains norms because it considers optimising the GBR directly too costly. Here the loss has a "
        "penalty of 1e-3 times the GBR of the logits, estimated by one random projection a step.",
    )
    of = (metrics.TOP1, metrics.GBR_LOGITS, metrics.FGSM, metrics.CPU_SECONDS)
    found = [compare(results, "quarter", ((1, "gbr-penalty"), (-1, cell)), m) for cell in (PLAIN, ENC) for m in of]
    section.tables += contrast_table(results, found)
    return section


def _cost(results: Results) -> Section:
    section = Section(
        "cost",
        "What ENC costs in training",
        "The paper: almost negligible in training, nothing at test time. Median seconds of a training step, and "
        "seconds of one core for a whole run, measurements included; the runs shared their machine with other work, "
        "so single ratios vary.",
    )
    wanted = [
        (((1, cell), (-1, PLAIN)), metric)
        for metric in (metrics.STEP_SECONDS, metrics.CPU_SECONDS)
        for cell in (ENC, "enc-wn", "enc-fro", "ws", "wn")
    ]
    section.tables += contrast_table(results, found_contrasts(results, wanted))
    return section


def _cells(found: Interval, metric: Metric) -> list[str]:
    """The mean and the interval as cells of a table."""
    low, high = (format(bound, metric.digits) for bound in (found.low, found.high))
    return [format(found.mean, metric.digits), "one seed" if math.isnan(found.low) else f"{low} to {high}"]
