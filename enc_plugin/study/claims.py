"""What the paper claims, what the runs say of it, and the verdict: one section a claim, from the results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from . import results as metrics
from .results import Metric, Results
from .statistics import (
    CONFIDENCE,
    Interval,
    geometric_interval,
    interval,
    paired_difference,
    paired_ratio,
    partial_rank_correlation,
    rank_correlation,
    shared_seeds,
)

REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "not reproduced", "not decided at this scale"
NOT_RUN = "not run yet"

EPS = {"quarter": (1, 2, 4, 8), "full": (1, 2, 4, 8), "digits": (4, 8, 16, 32)}
AUGMENTATIONS = {"cutout": "Cutout", "mixup": "Mixup", "cutmix": "CutMix", "ls": "LS"}
VARIANTS = ("enc-fro", "enc-wn", "enc-ws", "enc-cfro")
DECAYS = {"wd0": 0.0, "wd1e-8": 1e-8, "wd1e-6": 1e-6, "baseline": 1e-4, "wd1e-3": 1e-3, "wd1e-2": 1e-2}


def fgsm_mean(arena: str) -> Metric:
    """Accuracy under FGSM, averaged over the arena's eps: one number where the paper states no step size."""
    every = [metrics.fgsm(eps) for eps in EPS[arena]]

    def read(result: dict) -> float | None:
        values = [metric.read(result) for metric in every]
        return None if None in values else sum(values) / len(values)

    return Metric(f"top-1 accuracy (%) under FGSM, mean over {', '.join(map(str, EPS[arena]))} / 255", read)


@dataclass(frozen=True)
class Comparison:
    """Two cells of an arena by one metric, paired by seed.

    Attributes:
        claimed: 1 if the paper claims that the first is larger, -1 if smaller, 0 if it claims nothing.
        first: Mean of the first cell, geometric for metrics that compare by ratio; ``second`` likewise.
        effect: Mean difference, or ratio for metrics that compare by ratio, with its 95 % interval; None without runs.
    """

    arena: str
    cell: str
    other: str
    metric: Metric
    claimed: int
    first: float | None
    second: float | None
    effect: Interval | None

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves no doubt which is larger, else 0."""
        if self.effect is None or math.isnan(self.effect.low):
            return 0
        equal = 1.0 if self.metric.as_ratio else 0.0
        return (self.effect.low > equal) - (self.effect.high < equal)

    @property
    def verdict(self) -> str:
        """The claim's verdict, or for comparisons without one, whether a difference is seen."""
        if self.claimed == 0:
            return {1: "larger", -1: "smaller", 0: "no difference seen"}[self.sign]
        return {self.claimed: REPRODUCED, -self.claimed: CONTRADICTED, 0: UNDECIDED}[self.sign]


@dataclass
class Figure:
    """What a figure shows, as plain data.

    Attributes:
        name: File name without ending.
        kind: ``'curves'``: series with ``x``, ``mean``, ``low``, ``high``; ``'intervals'``: rows with ``label``,
            ``mean``, ``low``, ``high``; ``'scatter'``: series with ``x``, ``y``.
        data: Series or rows; None stands for curves that are not drawn, so that a cell looks the same everywhere.
    """

    name: str
    kind: str
    caption: str
    x_label: str
    y_label: str
    data: list[dict | None]
    log_x: bool = False
    log_y: bool = False
    reference: float | None = None
    y_limits: tuple[float | None, float | None] | None = None


@dataclass
class Section:
    """One claim or question: its text, what was measured, and the verdict in each arena that can tell."""

    name: str
    title: str
    claim: str
    comparisons: list[Comparison] = field(default_factory=list)
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    verdicts: dict[str, str] = field(default_factory=dict)


def compare(
    results: Results, arena: str, pairs: Iterable[tuple[str, str]], of: Iterable[Metric], claimed: int
) -> list[Comparison]:
    """Comparisons of each pair of cells by each metric; pairs that the grid does not plan are left out."""
    found = []
    for metric in of:
        for cell, other in pairs:
            if not (results.has_cell(arena, cell) and results.has_cell(arena, other)):
                continue
            a, b = results.values(arena, cell, metric), results.values(arena, other, metric)
            shared = shared_seeds(a, b, positive=metric.as_ratio)
            means = [_mean(metric, [side[s] for s in shared]).mean if shared else None for side in (a, b)]
            effect = (paired_ratio if metric.as_ratio else paired_difference)(a, b)
            found.append(Comparison(arena, cell, other, metric, claimed, *means, effect))
    return found


def _mean(metric: Metric, values: Iterable[float]) -> Interval:
    """Mean over seeds with its interval, geometric where cells are compared by ratio: the means' ratio is the ratio."""
    return (geometric_interval if metric.as_ratio else interval)(list(values))


def joint_verdict(comparisons: Sequence[Comparison]) -> str:
    """Reproduced if every part is, not reproduced if any part is contradicted, else not decided (or not run).

    Among many parts one lies on the other side by chance: a contradiction counts at the level divided by their number
    (Bonferroni). That all are on the claimed side needs no correction.
    """
    run = [comparison for comparison in comparisons if comparison.effect is not None]
    if not run:
        return NOT_RUN
    contradictions = [c.effect.p_value(c.metric.as_ratio) for c in run if c.verdict == CONTRADICTED]
    if any(p < (1 - CONFIDENCE) / len(run) for p in contradictions):
        return CONTRADICTED
    return REPRODUCED if all(comparison.verdict == REPRODUCED for comparison in comparisons) else UNDECIDED


def _claim(
    results: Results,
    name: str,
    title: str,
    claim: str,
    pairs: Sequence[tuple[str, str]],
    of: Callable[[str], Sequence[Metric]],
    claimed: int,
) -> Section:
    """Section of a claim that is a comparison of cells, in every arena that plans them."""
    section = Section(name, title, claim)
    for arena in results.grid.arenas:
        comparisons = compare(results, arena, pairs, of(arena), claimed)
        if comparisons:
            section.comparisons += comparisons
            if claimed:
                section.verdicts[arena] = joint_verdict(comparisons)
    return section


def sections(results: Results) -> list[Section]:
    """All sections of the report, in order."""
    return [
        _accuracy(results),
        _variants(results),
        _convergence(results),
        _gap(results),
        _gbr(results),
        _decay(results),
        _robustness(results),
        _augmentations(results),
        _all_together(results),
        _augmented_robustness(results),
        _alpha(results),
        _parts(results),
        _tightness(results),
        _gbr_and_accuracy(results),
        _learning_rates(results),
        _rival(results),
        _cost(results),
    ]


def _accuracy(results: Results) -> Section:
    section = _claim(
        results,
        "accuracy",
        "ENC raises the accuracy",
        "Tables 1 and 4: ENC (eq. 22) gains 0.27 to 0.90 points of top-1 on ImageNet over seven networks (ResNet-50: "
        "76.54 to 77.44).",
        [("enc-ws", "baseline")],
        lambda arena: [metrics.TOP1],
        claimed=1,
    )
    for arena, cells in results.grid.cells.items():
        if arena == "digits":  # all within an image or two of each other
            continue
        rows = [
            {"label": cell.title, **_bounds(interval(list(values.values())))}
            for cell in cells
            if (values := results.values(arena, cell.name, metrics.TOP1))
        ]
        if rows:
            where = results.grid.arenas[arena].title
            caption = f"Top-1 accuracy of every cell that has run, {where}: mean over seeds and 95 % interval."
            section.figures.append(Figure(f"cells_{arena}", "intervals", caption, metrics.TOP1.name, "", rows))
    return section


def _variants(results: Results) -> Section:
    return _claim(
        results,
        "variants",
        "Each of eq. 20 to 23 beats plain, WN and WS",
        "Table 1 (ResNet-50): plain 76.54, WN 76.44, WS 76.74, eq. 20 77.09, eq. 21 77.25, eq. 22 77.44, eq. 23 77.21.",
        [(cell, other) for cell in VARIANTS for other in ("baseline", "wn", "ws")],
        lambda arena: [metrics.TOP1] if arena != "full" else [],
        claimed=1,
    )


def _convergence(results: Results) -> Section:
    section = _claim(
        results,
        "convergence",
        "ENC converges faster",
        "Figure 2: ENC's validation accuracy rises earlier. Measured as the mean accuracy over the first half of the "
        "epochs.",
        [("enc-ws", "baseline"), ("enc-ws", "bn")],
        lambda arena: [metrics.EARLY_TOP1],
        claimed=1,
    )
    # The paper's claim is about the plain network; the control with the same batch norms is there to tell why.
    for arena in section.verdicts:
        of_paper = [c for c in section.comparisons if c.arena == arena and c.other == "baseline"]
        section.verdicts[arena] = joint_verdict(of_paper)
    for arena in ("full", "quarter"):
        caption = f"Validation accuracy over training, {results.grid.arenas[arena].title}; bands: 95 % over seeds."
        cells = ("baseline", "bn", "ws", "enc-ws")
        section.figures += _curves(results, f"accuracy_{arena}", arena, cells, "accuracy/top1", "top-1 (%)", caption)
    return section


def _gap(results: Results) -> Section:
    section = Section(
        "gap",
        "ENC generalizes better, rather than fits better",
        "Theorem 1 bounds the gap between test and training loss by the GBR. An accuracy that comes with a smaller "
        "training loss and the same gap is faster training instead. Both losses are of unaugmented images.",
    )
    ours = [("enc-ws", "baseline"), ("enc-ws", "bn")]
    for arena in results.grid.arenas:
        judged = compare(results, arena, ours, [metrics.GAP], -1)
        section.comparisons += judged
        section.comparisons += compare(results, arena, [("ws", "baseline")], [metrics.GAP], 0)
        section.comparisons += compare(results, arena, [*ours, ("ws", "baseline")], [metrics.TRAIN_LOSS], 0)
        section.verdicts[arena] = joint_verdict(judged)
    return section


def _gbr(results: Results) -> Section:
    section = _claim(
        results,
        "gbr",
        "ENC ends with a smaller GBR",
        "Figure 3: over training, ENC (decay 1e-4) ends with the lowest GBR, below plain at decay 1e-4 and at 1e-3.",
        [("enc-ws", "baseline"), ("enc-ws", "wd1e-3")],
        lambda arena: [metrics.GBR_LOGITS, metrics.GBR_PROBS],
        claimed=-1,
    )
    section.text.append(
        "The GBR of logits counts their scale, which the accuracy does not see; that of probabilities does not. The "
        "paper does not say which it measures, so both stand here. 512 fixed training images, one random projection "
        "each, x is the normalised image."
    )
    for arena in ("full", "quarter", "digits"):
        for key, what in (("gbr/logits", "logits"), ("gbr/probs", "probabilities")):
            caption = f"GBR of the {what} over training, {results.grid.arenas[arena].title}; bands: 95 % over seeds."
            section.figures += _curves(
                results,
                f"gbr_{what}_{arena}",
                arena,
                ("baseline", "bn", None, "enc-ws", "wd1e-3"),  # as the other figures look, without WS
                key,
                "mean squared Jacobian norm\n(output² per input²)",
                caption,
                log_y=True,
            )
    return section


def _decay(results: Results) -> Section:
    section = Section(
        "decay",
        "More weight decay, smaller GBR",
        "Figure 1: the larger lambda in {0, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2}, the smaller the GBR; lambda = 0 is "
        "unstable.",
    )
    arena = "quarter"
    for metric in (metrics.GBR_LOGITS, metrics.GBR_PROBS):
        points, rows = [], []
        for cell, decay in DECAYS.items():
            values = results.values(arena, cell, metric)
            points += [(decay, value) for value in values.values()]
            positive = [value for value in values.values() if value > 0]
            if positive:
                found = _mean(metric, positive)
                top1 = _mean(metrics.TOP1, results.values(arena, cell, metrics.TOP1).values())
                rows.append([f"{decay:g}", str(found.n), *_cells(found, metric), *_cells(top1, metrics.TOP1)])
        if not points:
            continue
        rho, p = rank_correlation(*zip(*points, strict=True))
        head = ["lambda", "seeds", metric.name, "95 % interval", "top-1 (%)", "95 % interval"]
        section.tables.append((results.grid.arenas[arena].title, head, rows))
        decided = len(rows) == len(DECAYS) and p < 0.05
        verdict = (REPRODUCED if rho < 0 else CONTRADICTED) if decided else UNDECIDED
        order = (
            "too few runs for an order"
            if math.isnan(rho)
            else f"rank correlation of lambda and GBR {rho:.2f}, p = {p:.2g}"
        )
        section.text.append(f"{metric.name}: {order} ({len(points)} runs): {verdict}.")
        before = section.verdicts.get(arena, verdict)
        section.verdicts[arena] = verdict if verdict == before else UNDECIDED
    # The chain of the argument, link by link: lambda lowers the norms, these the bound, and the bound the GBR.
    links = (metrics.FREE_NORM, metrics.LOG_PRODUCT, metrics.GBR_LOGITS, metrics.GBR_PROBS)
    section.comparisons = compare(
        results, arena, [(cell, "wd0") for cell in ("baseline", "wd1e-3", "wd1e-2")], links, 0
    )
    section.text.append(
        "The comparisons with decay 0 follow the argument: lambda lowers the norms, the norms lower the product that "
        "bounds the GBR, and the GBR follows, or does not."
    )
    diverged = [result["id"] for result in results.with_status("diverged") if result["cell"] in DECAYS]
    section.text.append(f"Diverged: {', '.join(diverged) or 'no run of these'}.")
    caption = f"GBR of the logits over training at each decay, {results.grid.arenas[arena].title}."
    section.figures += _curves(
        results, "gbr_decay", arena, tuple(DECAYS), "gbr/logits", "mean squared Jacobian norm", caption, log_y=True
    )
    return section


def _robustness(results: Results) -> Section:
    section = _claim(
        results,
        "robustness",
        "ENC is more robust to FGSM",
        "Table 3 (ResNet-50, step size not stated): 17.54 plain, 29.87 ENC. Measured on 2,000 test images (digits: all "
        "355), attacked in pixel space.",
        [("enc-ws", "baseline")],
        lambda arena: [fgsm_mean(arena), *(metrics.fgsm(eps) for eps in EPS[arena])],
        claimed=1,
    )
    for arena in ("full", "quarter", "digits"):
        series: list[dict | None] = []
        for cell in ("baseline", "bn", "ws", "enc-ws"):
            points = [
                (eps, interval(list(values.values())))
                for eps in EPS[arena]
                if (values := results.values(arena, cell, metrics.fgsm(eps)))
            ]
            series.append(_series(results.title(arena, cell), points) if points else None)
        if any(series):
            caption = f"Accuracy under FGSM, {results.grid.arenas[arena].title}; bands: 95 % over seeds."
            section.figures.append(
                Figure(f"fgsm_{arena}", "curves", caption, "eps (1/255 of the pixel range)", "top-1 (%)", series)
            )
    return section


def _augmentations(results: Results) -> Section:
    pairs = [(f"enc-{name}", name) for name in AUGMENTATIONS] + [("enc-ws", name) for name in AUGMENTATIONS]
    section = _claim(
        results,
        "augmentations",
        "ENC adds to Cutout, Mixup, CutMix and label smoothing, and beats each alone",
        "Table 2 (ResNet-50): Cutout 76.48 to 77.47 with ENC, Mixup 76.70 to 77.50, CutMix 76.57 to 77.94, LS 76.75 to "
        "77.37; ENC alone 77.44.",
        pairs,
        lambda arena: [metrics.TOP1],
        claimed=1,
    )
    section.text.append(
        "At so few epochs augmentation mostly slows training down, and what ENC adds may be its faster convergence; "
        "that says little about long schedules."
    )
    return section


def _all_together(results: Results) -> Section:
    section = _claim(
        results,
        "all-together",
        "ENC + CutMix + LS does best of all",
        "Table 2 (ResNet-50): 77.96 together, 77.94 without LS, 77.44 ENC alone, 76.54 plain.",
        [("enc-cutmix-ls", other) for other in ("baseline", "enc-ws", "enc-cutmix")],
        lambda arena: [metrics.TOP1],
        claimed=1,
    )
    section.text.append(
        "Until the runs were done, the comparison with plain was a part of the claim above, which was not decided for "
        "it; those with ENC and with ENC + CutMix were added with the split."
    )
    return section


def _augmented_robustness(results: Results) -> Section:
    pairs = [(f"enc-{name}", name) for name in AUGMENTATIONS] + [("enc-cutmix-ls", "enc-ws")]
    return _claim(
        results,
        "augmented-robustness",
        "ENC adds robustness to each of them",
        "Table 3: Cutout 18.26 to 31.49 with ENC, Mixup 21.64 to 26.34, CutMix 32.94 to 33.12, LS 27.11 to 34.03, "
        "ENC + CutMix + LS 34.81 the highest.",
        pairs,
        lambda arena: [fgsm_mean(arena)],
        claimed=1,
    )


def _alpha(results: Results) -> Section:
    return _claim(
        results,
        "alpha",
        "alpha = 1 does best, a learnable alpha worst",
        "Table 5: alpha 0.5 77.31, 1 77.44, 2 77.40, learnable 77.08. Behind a batch norm, alpha can act through its "
        "eps alone.",
        [
            ("enc-a0.5", "enc-ws"),
            ("enc-a2", "enc-ws"),
            ("enc-alearn", "enc-ws"),
            ("enc-alearn", "enc-a0.5"),
            ("enc-alearn", "enc-a2"),
        ],
        lambda arena: [metrics.TOP1],
        claimed=-1,
    )


# What two cells differ in: in the text, and as a figure's label.
_PARTS = (
    ("bn", "baseline", "the classifier's batch norm, on the plain network", "classifier BN, plain"),
    ("enc-ws", "enc-ws-nobn", "the classifier's batch norm, under ENC", "classifier BN, ENC"),
    ("bn-shift", "bn", "the epsilon shift, on the plain network", "shift, plain"),
    ("enc-ws", "enc-ws-noshift", "the epsilon shift, under ENC", "shift, ENC"),
    ("enc-ws-bneps", "enc-ws", "batch norm's eps (1e-12 for 1e-5), under ENC", "BN eps 1e-12, ENC"),
    ("enc-wn", "bn", "the constraint on norms alone (eq. 21), both with the batch norm", "norms constrained"),
    ("enc-ws", "enc-wn", "the removed means (eq. 22 for 21)", "means removed, ENC"),
    ("ws-bn", "bn", "the removed means without the constraint (WS), both with the batch norm", "means removed, WS"),
    ("enc-ws", "ws-bn", "the constraint, both with removed means and the batch norm", "constraint on WS"),
    ("enc-ws", "bn", "all of ENC but the batch norm", "ENC less classifier BN"),
    ("enc-ws", "baseline", "ENC as a whole", "ENC as a whole"),
)


def _parts(results: Results) -> Section:
    section = Section(
        "parts",
        "Which part does the work?",
        "ENC changes several things at once: the classifier gains a batch norm, weights of norm 1 feel its eps, "
        "decay is shifted, eq. 22 removes means. With a batch norm behind every layer, eq. 20 and 21 train like the "
        "plain network with the same batch norms but for eps and shift. The paper has no such controls; here they are.",
    )
    for arena in results.grid.arenas:
        pairs = [(a, b) for a, b, _, _ in _PARTS]
        of = (metrics.TOP1, metrics.GBR_LOGITS, fgsm_mean(arena))
        found = [c for c in compare(results, arena, pairs, of, 0) if c.effect is not None]
        section.comparisons += found
        reasons = {(a, b): (why, label) for a, b, why, label in _PARTS}
        rows = [
            {"label": reasons[c.cell, c.other][1], **_bounds(c.effect)}
            for c in found
            if c.metric is metrics.TOP1 and not math.isnan(c.effect.low)
        ]
        if rows:
            caption = f"What each part changes in top-1 accuracy, {results.grid.arenas[arena].title}."
            section.figures.append(
                Figure(f"parts_{arena}", "intervals", caption, "difference of top-1 (points)", "", rows, reference=0.0)
            )
        section.text += [_say_part(results, c, reasons[c.cell, c.other][0]) for c in found if c.metric is metrics.TOP1]
    return section


def _say_part(results: Results, c: Comparison, why: str) -> str:
    effect = f"{c.effect.mean:+.2f} points"
    if not math.isnan(c.effect.low):
        effect += f" [{c.effect.low:+.2f}, {c.effect.high:+.2f}]"
    seen = {1: "helps", -1: "costs accuracy", 0: "no difference seen"}[c.sign]
    seen = "one seed, which decides nothing" if c.effect.n == 1 else f"{c.effect.n} seeds: {seen}"
    names = f"{results.title(c.arena, c.cell)} - {results.title(c.arena, c.other)}"
    return f"{c.arena}: {why} ({names}): {effect}, {seen}."


def _tightness(results: Results) -> Section:
    section = _claim(
        results,
        "tightness",
        "ENC tightens the bound",
        "Eq. 16, 17 and 19: equal norms make AM-GM an equality. Batch norms fold into the weights at test time, and "
        "the bound is about the folded ones: their slack, log of mean power over product, is 0 at equality.",
        [("enc-ws", "baseline"), ("enc-ws", "bn")],
        lambda arena: [metrics.SLACK, metrics.MAP_SLACK],
        claimed=-1,
    )
    section.comparisons += [
        comparison
        for arena in results.grid.arenas
        for comparison in compare(results, arena, [("enc-ws", "baseline")], [metrics.LOG_PRODUCT], 0)
    ]
    return section


def _gbr_and_accuracy(results: Results) -> Section:
    section = Section(
        "correlations",
        "Does a smaller GBR go with better generalization?",
        "Theorems 1 and 2 bound the gap between expected and empirical loss by the GBR; weight decay works, the paper "
        "says, because norms bound the GBR. Rank correlations over all finished runs of an arena. p is of a "
        "permutation test that takes runs as independent; the seeds of a cell are not, so that it is too small. A run "
        "that is trained further has another GBR, gap and accuracy at once; the partial correlation compares runs as "
        "if their training losses were equal.",
    )
    quantities = (metrics.TOP1, metrics.GAP, metrics.TRAIN_LOSS, metrics.FREE_NORM, metrics.LOG_PRODUCT)
    for arena, cells in results.grid.cells.items():
        runs = [result for cell in cells for result in results.seeds(arena, cell.name).values()]
        rows = [
            row
            for gbr in (metrics.GBR_LOGITS, metrics.GBR_PROBS)
            for other in quantities
            if (row := _correlation(runs, gbr, other))
        ]
        if rows:
            head = ["GBR", "with", "Spearman's rho", "p", "rho at equal training loss", "p", "runs"]
            section.tables.append((results.grid.arenas[arena].title, head, rows))
        if arena == "digits" or len(runs) < 3:
            continue
        for metric, name in ((metrics.TOP1, "top1"), (metrics.FREE_NORM, "norm"), (metrics.GAP, "gap")):
            series = []
            for what, of_kind in (("plain and controls", False), ("ENC", True)):
                kind = [r for r in runs if r["cell"].startswith("enc") == of_kind]
                points = [(metrics.GBR_LOGITS.read(r), metric.read(r)) for r in kind]
                points = [point for point in points if None not in point]
                if points:
                    x, y = zip(*points, strict=True)
                    series.append({"label": what, "x": list(x), "y": list(y)})
            caption = f"{metric.name} against the GBR of the logits, every run, {results.grid.arenas[arena].title}."
            section.figures.append(
                Figure(
                    f"gbr_{name}_{arena}",
                    "scatter",
                    caption,
                    "GBR of the logits",
                    metric.name,
                    series,
                    log_x=True,
                    log_y=metric.as_ratio,
                )
            )
    return section


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
        "Would another learning rate change the verdict?",
        "The paper trains both at 0.1. An untuned baseline is no baseline, nor an untuned ENC: each side at 0.03, 0.1 "
        "and 0.3, and the best of one against the best of the other.",
    )
    arena, rates = "quarter", {"lr0.03": 0.03, "": 0.1, "lr0.3": 0.3}
    best: dict[str, tuple[float, str]] = {}
    rows = []
    for side, base in (("plain", "baseline"), ("ENC", "enc-ws")):
        for suffix, rate in rates.items():
            cell = base if not suffix else suffix if side == "plain" else f"enc-ws-{suffix}"
            values = results.values(arena, cell, metrics.TOP1)
            if not values:
                continue
            found = interval(list(values.values()))
            rows.append([side, f"{rate:g}", str(found.n), *_cells(found, metrics.TOP1)])
            best[side] = max(best.get(side, (-math.inf, "")), (found.mean, cell))
    if rows:
        section.tables.append(
            (results.grid.arenas[arena].title, ["side", "lr", "seeds", "top-1 (%)", "95 % interval"], rows)
        )
    if len(rows) == 2 * len(rates):
        section.comparisons = compare(results, arena, [(best["ENC"][1], best["plain"][1])], [metrics.TOP1], 1)
        section.verdicts[arena] = joint_verdict(section.comparisons)
        section.text.append("The comparison takes the best of three rates on both sides: its interval is optimistic.")
    return section


def _rival(results: Results) -> Section:
    section = Section(
        "rival",
        "The rival: the GBR itself as a term of the loss",
        "The paper calls optimising the GBR directly too costly and takes the way over the norms. Penalty 1e-3 times "
        "the GBR of the logits, one random projection a step.",
    )
    of = (metrics.TOP1, metrics.GBR_LOGITS, fgsm_mean("quarter"), metrics.CPU_SECONDS)
    section.comparisons = compare(results, "quarter", [("gbr-penalty", "baseline"), ("gbr-penalty", "enc-ws")], of, 0)
    return section


def _cost(results: Results) -> Section:
    section = Section(
        "cost",
        "What ENC costs in training",
        "The paper: almost negligible in training, nothing at test time. Median seconds of a training step, and "
        "seconds of one core for a whole run, measurements included; the runs share their machine with other work, so "
        "that single ratios vary.",
    )
    for arena in results.grid.arenas:
        pairs = [(cell, "baseline") for cell in ("enc-ws", "enc-wn", "enc-fro", "ws", "wn")]
        section.comparisons += [
            c
            for c in compare(results, arena, pairs, [metrics.STEP_SECONDS, metrics.CPU_SECONDS], 0)
            if c.effect is not None
        ]
    return section


def _curves(
    results: Results,
    name: str,
    arena: str,
    cells: Sequence[str | None],
    key: str,
    y_label: str,
    caption: str,
    log_y: bool = False,
) -> list[Figure]:
    """A figure of a logged quantity over epochs, mean (geometric if log_y) and 95 % band; none if no cell has run."""
    series: list[dict | None] = []
    for cell in cells:
        by_epoch: dict[float, list[float]] = {}
        for result in results.seeds(arena, cell).values() if cell else ():
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


def _cells(found: Interval, metric: Metric) -> list[str]:
    """The mean and the interval as cells of a table."""
    low, high = (format(bound, metric.digits) for bound in (found.low, found.high))
    return [format(found.mean, metric.digits), "one seed" if math.isnan(found.low) else f"{low} to {high}"]
