"""The sections of a study's page: one a claim, then questions that the paper does not ask; from the results alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from enc_plugin.engine.efolds import config_efolds
from lab import ROOT

from . import results as metrics
from .claims import (
    CLAIMS,
    DECAY_PAPER,
    DECAY_TITLE,
    DECAYS,
    ENC,
    NEEDED_EFOLDS,
    PARTS,
    PLAIN,
)
from .grid import GAUGES, Cell, PlannedRun
from .results import Metric, Results
from .statistics import (
    Interval,
    contrast,
    geometric_interval,
    homogeneity,
    interval,
    partial_rank_correlation,
    rank_correlation,
)
from .verdicts import (
    HOLDS,
    NOT_TESTABLE,
    OPPOSITE,
    UNDECIDED,
    Claim,
    Comparison,
    compare,
    decide,
    describe_terms,
    effect_text,
    is_planned,
)

Table = tuple[str, list[str], list[list[str]]]  # title, head, rows
SHOWN = (PLAIN, "bn", "ws", "ws-bn", ENC)  # in curves, in this order in every figure


@dataclass
class Figure:
    """What a figure shows, as plain data.

    Attributes:
        name: File name without ending.
        kind: ``'curves'``: series with ``label``, ``x``, ``mean``, ``low``, ``high``; ``'intervals'``: rows with
            ``label``, ``mean``, ``low``, ``high``, ``group``; ``'scatter'``: series with ``label``, ``x``, ``y``.
        data: Series or rows; None stands for curves that are not drawn, so that a cell looks the same everywhere.
        band: Of an ``'intervals'`` figure: the interval of what the rows are compared with.
    """

    name: str
    kind: str
    caption: str
    x_label: str
    y_label: str
    data: list[dict | None]
    log_x: bool = False
    log_y: bool = False
    band: tuple[float, float] | None = None


@dataclass(frozen=True)
class Verdict:
    """The word for a claim in one arena, and the estimate that it goes by, as text."""

    word: str
    effect: str = ""

    def __str__(self) -> str:
        return f"**{self.word}** {self.effect}".rstrip()


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


def sections(results: Results) -> list[Section]:
    """All sections of the report, in order."""
    claimed = [_claim(results, claim) for claim in CLAIMS]
    by_name = {section.name: section for section in claimed}
    _add_controls(results, by_name)
    _add_curves(results, by_name)
    questions = (_classes, _parts, _gbr_and_accuracy, _learning_rates, _rival, _cost)
    return [*claimed, _decay(results), *(question(results) for question in questions)]


def _claim(results: Results, claim: Claim) -> Section:
    """A claim is one contrast in every arena that plans its cells."""
    section = Section(claim.name, claim.title, f"The paper: {claim.paper}. Measured: {claim.metric.name}.")
    found = [
        compare(results, arena, claim.terms, claim.metric)
        for arena in results.grid.arenas
        if is_planned(results, arena, claim.terms)
    ]
    # An arena whose finished runs lack the measure was not measured for this claim.
    found = [c for c in found if c.effect is not None or not results.finished(c.arena, [x for _, x in c.terms])]
    for comparison in found:
        word = decide(comparison.effect, claim.effect, claim.metric.as_ratio)
        section.verdicts[comparison.arena] = Verdict(word, effect_text(comparison))
    section.tables += _table(results, found, [str(section.verdicts[c.arena].word) for c in found])
    return section


def _add_controls(results: Results, by_name: dict[str, Section]) -> None:
    """What stands beside a claim to tell why: other measures of the same cells, and cells with a part of ENC."""
    beside = {
        "accuracy": [(((1, ENC), (-1, PLAIN)), m) for m in (metrics.TRAIN_LOSS, metrics.GAP)],
        "convergence": [(((1, ENC), (-1, "bn")), metrics.EARLY_TOP1)],
        "gbr": [(((1, ENC), (-1, PLAIN)), metrics.GBR_PROBS), (((1, "bn"), (-1, PLAIN)), metrics.GBR_LOGITS)]
        + [(((1, ENC), (-1, cell)), metrics.GBR_LOGITS) for cell in ("wd1e-3", "wd3e-2")],
        "robustness": [(((1, ENC), (-1, PLAIN)), metrics.PGD), (((1, "ws-bn"), (-1, PLAIN)), metrics.FGSM)],
    }
    for name, wanted in beside.items():
        found = [
            comparison
            for arena in results.grid.arenas
            for terms, metric in wanted
            if is_planned(results, arena, terms)
            and (comparison := compare(results, arena, terms, metric)).effect is not None
        ]
        by_name[name].tables += _table(results, found, [c.seen for c in found], "Beside it")


def _add_curves(results: Results, by_name: dict[str, Section]) -> None:
    for arena, settings in results.grid.arenas.items():
        where = f"{settings.title}; bands: 95 % over seeds"
        caption = f"Validation accuracy over training, {where}."
        by_name["convergence"].figures += _curves(
            results, f"accuracy_{arena}", arena, SHOWN, "accuracy/top1", "top-1 accuracy (%)", caption
        )
        caption = f"GBR of the logits over training, {where}; 512 training images, x is the normalised image."
        by_name["gbr"].figures += _curves(
            results, f"gbr_{arena}", arena, SHOWN, "gbr/logits", "GBR of the logits", caption, log_y=True
        )
        by_name["robustness"].figures += _fgsm_curves(results, arena)


def _fgsm_curves(results: Results, arena: str) -> list[Figure]:
    series: list[dict | None] = []
    for cell in SHOWN:
        by_eps: dict[float, list[float]] = {}
        for result in results.seeds(arena, cell).values():
            for key, value in result["final"].items():
                if key.startswith("fgsm/top1_eps") and value is not None:
                    by_eps.setdefault(float(key.removeprefix("fgsm/top1_eps")), []).append(value)
        points = [(eps, interval(values)) for eps, values in sorted(by_eps.items())]
        series.append(_series(results.title(arena, cell), points) if points else None)
    caption = f"Accuracy under FGSM, {results.grid.arenas[arena].title}; bands: 95 % over seeds."
    figure = Figure(f"fgsm_{arena}", "curves", caption, "eps (1/255 of the pixel range)", "top-1 accuracy (%)", series)
    return [figure] if any(series) else []


def _decay(results: Results) -> Section:
    """Judged by the order of all runs: a claim about a trend, where one contrast would take the ends alone."""
    section = Section("decay", DECAY_TITLE, f"The paper: {DECAY_PAPER}.")
    for arena, decays in DECAYS.items():
        if arena not in results.grid.arenas:
            continue
        efolds = max(cell_efolds(cell) for cell in results.grid.cells[arena] if cell.name in decays)
        points, rows = [], []
        for cell, decay in decays.items():
            values = [v for v in results.values(arena, cell, metrics.GBR_LOGITS).values() if v > 0]
            points += [(decay, value) for value in values]
            if values:
                columns = [metrics.GBR_LOGITS, metrics.GBR_MARGIN, metrics.FREE_NORM, metrics.TOP1, metrics.TRAIN_LOSS]
                acts = cell_efolds(next(c for c in results.grid.cells[arena] if c.name == cell))
                rows.append([f"{decay:g}", f"{acts:.2g}", str(len(values)), *_means(results, arena, cell, columns)])
        rho, p = rank_correlation(*zip(*points, strict=True)) if points else (math.nan, math.nan)
        word = {True: HOLDS, False: OPPOSITE}[rho < 0] if p < 0.05 else UNDECIDED
        if efolds < NEEDED_EFOLDS or math.isnan(rho):
            word = NOT_TESTABLE
        text = "" if math.isnan(rho) else f"rho {rho:+.2f} (p {p:.2g}, {len(points)} runs, e-folds up to {efolds:.2g})"
        section.verdicts[arena] = Verdict(word, text)
        head = ["lambda", "e-folds", "seeds", "GBR of the logits", "over squared margin", "||W||^2", "top-1 (%)"]
        if rows:
            section.tables.append((results.grid.arenas[arena].title, [*head, "training loss"], rows))
        caption = f"GBR of the logits over training at each decay, {results.grid.arenas[arena].title}."
        section.figures += _curves(
            results, f"gbr_decay_{arena}", arena, tuple(decays), "gbr/logits", "GBR of the logits", caption, log_y=True
        )
    section.text.append(
        "Spearman's rank correlation of lambda and GBR over all runs, p from permutations. E-folds say how much decay "
        "acts (docs/gauge.md): below 1 at the largest lambda the claim is not testable."
    )
    return section


def cell_efolds(cell: Cell) -> float:
    """E-folds of ||W||^2 by decay in the runs of a cell."""
    cfg = PlannedRun(cell, cell.seeds[0]).config(ROOT)
    return config_efolds(cfg, math.ceil(cell.arena.images / cfg.train_dataloader.batch_size)) or 0.0


def _classes(results: Results) -> Section:
    section = Section(
        "classes",
        "Which part does the work, by class?",
        "Given batch norm, cells of one class train alike (docs/gauge.md), so a class is one method with many runs. "
        "ENC's effect is that of removed row means and of the classifier's batch norm. Cells without a class differ in "
        "decay, learning rate, augmentation or loss.",
    )
    for arena, cells in results.grid.cells.items():
        pooled: dict[str, list[float]] = {}
        rows = []
        for gauge in GAUGES:
            members = [
                (cell.title, list(results.values(arena, cell.name, metrics.TOP1).values()))
                for cell in cells
                if cell.gauge == gauge
            ]
            members = [(title, values) for title, values in members if values]
            if members:
                values = [value for _, found in members for value in found]
                pooled[gauge] = values
                p = homogeneity([found for _, found in members])
                alike = "" if math.isnan(p) else f"{p:.2g}"
                titles = ", ".join(title for title, _ in members)
                rows.append([gauge, titles, str(len(values)), *_cells(interval(values), metrics.TOP1), alike])
        head = ["class", "cells", "runs", "top-1 (%)", "95 % interval", "p that its cells are alike"]
        if rows:
            section.tables.append((results.grid.arenas[arena].title, head, rows))
        kept, kept_bn, removed, removed_bn = (pooled.get(gauge) for gauge in GAUGES)
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
        section.figures += _cell_figure(results, arena)
    return section


def _cell_figure(results: Results, arena: str) -> list[Figure]:
    """Every cell by class, with the plain network's interval as a band."""
    rows = []
    order = {gauge: place for place, gauge in enumerate(GAUGES)}
    for cell in sorted(results.grid.cells[arena], key=lambda cell: order.get(cell.gauge, len(order))):
        values = list(results.values(arena, cell.name, metrics.TOP1).values())
        if values:
            found = interval(values)
            rows.append({"label": cell.title, **_bounds(found), "group": cell.gauge or "another recipe"})
    if not rows:
        return []
    caption = (
        f"Top-1 accuracy of every cell, {results.grid.arenas[arena].title}: mean over seeds and 95 % interval; the "
        "band is the plain network's."
    )
    plain = list(results.values(arena, PLAIN, metrics.TOP1).values())
    band = (interval(plain).low, interval(plain).high) if len(plain) > 1 else None
    return [Figure(f"cells_{arena}", "intervals", caption, metrics.TOP1.name, "", rows, band=band)]


def _parts(results: Results) -> Section:
    section = Section(
        "parts",
        "Which part does the work, cell by cell?",
        "ENC changes several things at once; the paper has no controls for them, here they are.",
    )
    for arena in results.grid.arenas:
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
        "finished runs of an arena. p is of a permutation test that takes runs as independent; the seeds of a cell are "
        "not, so it is too small. A run that is trained further has another GBR, gap and accuracy at once; the partial "
        "correlation compares runs as if their training losses were equal. 24 runs with WS or WN have no folded norms, "
        "because these were read from weights that the networks do not compute with: rows of norms leave them out.",
    )
    quantities = (
        metrics.TOP1,
        metrics.GAP,
        metrics.TRAIN_LOSS,
        metrics.FREE_NORM,
        metrics.LOG_PRODUCT,
        metrics.RESIDUAL_BOUND,
    )
    for arena, cells in results.grid.cells.items():
        runs = [result for cell in cells for result in results.seeds(arena, cell.name).values()]
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
            section.figures += _scatter(results, arena, runs)
    return section


def _scatter(results: Results, arena: str, runs: Sequence[dict]) -> list[Figure]:
    figures = []
    for metric, name in ((metrics.TOP1, "top1"), (metrics.GAP, "gap")):
        series = []
        for what, of_kind in (("plain and controls", False), ("ENC", True)):
            kind = [r for r in runs if r["cell"].startswith("enc") == of_kind]
            points = [(metrics.GBR_LOGITS.read(r), metric.read(r)) for r in kind]
            points = [point for point in points if None not in point]
            if points:
                x, y = zip(*points, strict=True)
                series.append({"label": what, "x": list(x), "y": list(y)})
        caption = f"{metric.name} against the GBR of the logits, every run, {results.grid.arenas[arena].title}."
        if sum(len(one["x"]) for one in series) >= 3:
            figures.append(
                Figure(f"gbr_{name}_{arena}", "scatter", caption, "GBR of the logits", metric.name, series, log_x=True)
            )
    return figures


def _correlation(runs: Sequence[dict], gbr: Metric, other: Metric) -> list[str]:
    """A row of the table: rank correlation, plain and at equal training loss; empty where there is none."""
    triples = [(gbr.read(r), other.read(r), metrics.TRAIN_LOSS.read(r)) for r in runs]
    triples = [triple for triple in triples if None not in triple]
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
        "The paper trains both at 0.1. An untuned baseline is no baseline, nor an untuned ENC: each side at 0.03, 0.1 "
        "and 0.3, and the best of one against the best of the other, whose interval is optimistic for that choice.",
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
            found = interval(list(values.values()))
            rows.append([side, f"{rate:g}", str(found.n), *_cells(found, metrics.TOP1)])
            best[side] = max(best.get(side, (-math.inf, "")), (found.mean, cell))
    if rows:
        head = ["side", "lr", "seeds", "top-1 (%)", "95 % interval"]
        section.tables.append((results.grid.arenas[arena].title, head, rows))
    if len(rows) == 2 * len(rates):
        found = compare(results, arena, ((1, best["ENC"][1]), (-1, best["plain"][1])), metrics.TOP1)
        section.tables += _table(results, [found], [found.seen])
    return section


def _rival(results: Results) -> Section:
    section = Section(
        "rival",
        "The rival: the GBR itself as a term of the loss",
        "The paper calls optimising the GBR directly too costly and takes the way over the norms. Penalty 1e-3 times "
        "the GBR of the logits, one random projection a step.",
    )
    of = (metrics.TOP1, metrics.GBR_LOGITS, metrics.FGSM, metrics.CPU_SECONDS)
    found = [compare(results, "quarter", ((1, "gbr-penalty"), (-1, cell)), m) for cell in (PLAIN, ENC) for m in of]
    section.tables += _table(results, found, [c.seen for c in found])
    return section


def _cost(results: Results) -> Section:
    section = Section(
        "cost",
        "What ENC costs in training",
        "The paper: almost negligible in training, nothing at test time. Median seconds of a training step, and "
        "seconds of one core for a whole run, measurements included; the runs share their machine with other work, so "
        "that single ratios vary.",
    )
    found = [
        comparison
        for arena in results.grid.arenas
        for metric in (metrics.STEP_SECONDS, metrics.CPU_SECONDS)
        for cell in (ENC, "enc-wn", "enc-fro", "ws", "wn")
        if is_planned(results, arena, ((1, cell), (-1, PLAIN)))
        and (comparison := compare(results, arena, ((1, cell), (-1, PLAIN)), metric)).effect is not None
    ]
    section.tables += _table(results, found, [c.seen for c in found])
    return section


def _table(results: Results, found: Sequence[Comparison], words: Iterable[str], title: str = "") -> list[Table]:
    """Contrasts as a table; means of the cells where a side has one."""
    rows = []
    for c, word in zip(found, words, strict=True):
        first, second = describe_terms(results, c.arena, c.terms)
        means = [""] * 2
        if len(c.terms) == 2:
            means = ["-" if mean is None else format(mean, c.metric.digits) for mean in c.means]
        seeds = str(c.effect.n) if c.effect else "0"
        rows.append([c.arena, first, second, c.metric.name, *means, effect_text(c), seeds, word])
    head = ["arena", "A", "B", "measured", "mean A", "mean B", "A against B [95 %]", "seeds", "result"]
    return [(title, head, rows)] if rows else []


def _curves(
    results: Results,
    name: str,
    arena: str,
    cells: Sequence[str],
    key: str,
    y_label: str,
    caption: str,
    log_y: bool = False,
) -> list[Figure]:
    """A figure of a logged quantity over epochs, mean (geometric if log_y) and 95 % band; none if no cell has run."""
    series: list[dict | None] = []
    for cell in cells:
        by_epoch: dict[float, list[float]] = {}
        for result in results.seeds(arena, cell).values():
            for epoch, value in result["by_epoch"].get(key, []):
                if value is not None and (not log_y or (epoch > 0 and value > 0)):
                    by_epoch.setdefault(epoch, []).append(value)
        mean = geometric_interval if log_y else interval
        points = [(epoch, mean(values)) for epoch, values in sorted(by_epoch.items())]
        series.append(_series(results.title(arena, cell), points) if points else None)
    return [Figure(name, "curves", caption, "epoch", y_label, series, log_y=log_y)] if any(series) else []


def _series(label: str, points: Sequence[tuple[float, Interval]]) -> dict:
    return {
        "label": label,
        "x": [x for x, _ in points],
        "mean": [found.mean for _, found in points],
        "low": [None if math.isnan(found.low) else found.low for _, found in points],
        "high": [None if math.isnan(found.high) else found.high for _, found in points],
    }


def _bounds(found: Interval) -> dict:
    low, high = (None, None) if math.isnan(found.low) else (found.low, found.high)
    return {"mean": found.mean, "low": low, "high": high}


def _means(results: Results, arena: str, cell: str, of: Sequence[Metric]) -> list[str]:
    texts = []
    for metric in of:
        values = list(results.values(arena, cell, metric).values())
        mean = geometric_interval if metric.as_ratio else interval
        texts.append(format(mean(values).mean, metric.digits) if values else "-")
    return texts


def _cells(found: Interval, metric: Metric) -> list[str]:
    """The mean and the interval as cells of a table."""
    low, high = (format(bound, metric.digits) for bound in (found.low, found.high))
    return [format(found.mean, metric.digits), "one seed" if math.isnan(found.low) else f"{low} to {high}"]
