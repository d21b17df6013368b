"""The claims of the paper, each as one number, declared before the runs that decide them.

``effect`` is the paper's, in the unit of the metric. Where the paper draws a curve and states no number, the effect
that would be worth having is declared in its place, and ``paper`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from . import results as metrics
from .results import Metric
from .verdicts import Terms

ENC, PLAIN = "enc-ws", "baseline"
AUGMENTATIONS = ("cutout", "mixup", "cutmix", "ls")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper as one number, declared before the runs that decide it.

    Attributes:
        title: The claim, as tables call it.
        paper: What the paper reports; where it states no number, what is taken for one.
        terms: Weights and cells; the weights sum to 0.
        metric: What is measured. Metrics that compare by ratio are contrasted in their logarithms.
        effect: The paper's effect in the unit of the metric, a factor for ratios. Its side is the claimed one.
        beside: Contrasts without a verdict that tell why: other measures of the same cells, cells with a part of ENC.
        elsewhere: Arenas that have other cells for it: the terms there, and the paper's effect for these.
        curve: Figures beside it: ``'accuracy'`` or ``'gbr'`` over training, ``'fgsm'`` over eps, or none.
    """

    name: str
    title: str
    paper: str
    terms: Terms
    metric: Metric
    effect: float
    beside: tuple[tuple[Terms, Metric], ...] = ()
    elsewhere: Mapping[str, tuple[Terms, float]] = field(default_factory=dict)
    curve: str = ""

    def asked_in(self, arena: str) -> tuple[Terms, float]:
        """Terms and the paper's effect in an arena."""
        return self.elsewhere.get(arena, (self.terms, self.effect))


def _versus(cell: str, other: str) -> Terms:
    return (1, cell), (-1, other)


def _augmented(*names: str) -> Terms:
    """ENC with an augmentation against the augmentation alone, on average."""
    return tuple(term for name in names for term in ((1 / len(names), f"enc-{name}"), (-1 / len(names), name)))


_AUGMENTED = _augmented(*AUGMENTATIONS)
_TWO_AUGMENTED = _augmented("cutmix", "ls")

CLAIMS = (
    Claim(
        "accuracy",
        "ENC raises the accuracy",
        "+0.90 points of top-1 (table 1; +0.27 to +0.90 over seven networks, table 4)",
        _versus(ENC, PLAIN),
        metrics.TOP1,
        effect=0.90,
        beside=((_versus(ENC, PLAIN), metrics.TRAIN_LOSS), (_versus(ENC, PLAIN), metrics.GAP)),
    ),
    Claim(
        "norm-only",
        "ENC 'wn' (eq. 21), which keeps the row means, raises it",
        "+0.71 points (table 1)",
        _versus("enc-wn", PLAIN),
        metrics.TOP1,
        effect=0.71,
    ),
    Claim(
        "standardization",
        "ENC beats weight standardization",
        "+0.70 points (table 1)",
        _versus(ENC, "ws"),
        metrics.TOP1,
        effect=0.70,
    ),
    Claim(
        "convergence",
        "ENC learns faster (first half)",
        "figure 2, taken as +1",
        _versus(ENC, PLAIN),
        metrics.EARLY_TOP1,
        effect=1.0,
        beside=((_versus(ENC, "bn"), metrics.EARLY_TOP1),),
        curve="accuracy",
    ),
    Claim(
        "gbr",
        "ENC ends with a smaller GBR",
        "figure 3, taken as x0.8",
        _versus(ENC, PLAIN),
        metrics.GBR_LOGITS,
        effect=0.8,
        beside=(
            (_versus(ENC, PLAIN), metrics.GBR_PROBS),
            (_versus("bn", PLAIN), metrics.GBR_LOGITS),
            (_versus(ENC, "wd1e-3"), metrics.GBR_LOGITS),
            (_versus(ENC, "wd3e-2"), metrics.GBR_LOGITS),
            (_versus("enc-ws-wd1e-4", "wd1e-4"), metrics.GBR_LOGITS),
            (_versus("enc-ws-wd1e-4", "wd1e-3"), metrics.GBR_LOGITS),
        ),
        curve="gbr",
    ),
    Claim(
        "gbr-margin",
        "... also relative to the squared margin, which frees it of the scale of the logits",
        "not measured, taken as x0.8",
        _versus(ENC, PLAIN),
        metrics.GBR_MARGIN,
        effect=0.8,
    ),
    Claim(
        "robustness",
        "ENC is more robust to FGSM",
        "+12.3, eps not stated (table 3)",
        _versus(ENC, PLAIN),
        metrics.FGSM,
        effect=12.33,
        beside=((_versus(ENC, PLAIN), metrics.PGD), (_versus("ws-bn", PLAIN), metrics.FGSM)),
        curve="fgsm",
    ),
    Claim(
        "augmentations",
        "With Cutout, Mixup, CutMix or label smoothing, ENC raises the accuracy",
        "+0.95 points on average (table 2)",
        _AUGMENTED,
        metrics.TOP1,
        effect=0.945,
        elsewhere={"g2": (_TWO_AUGMENTED, 0.995)},
    ),
    Claim(
        "all-together",
        "ENC with CutMix and label smoothing (LS) beats ENC without",
        "+0.52 points (table 2)",
        _versus("enc-cutmix-ls", ENC),
        metrics.TOP1,
        effect=0.52,
    ),
    Claim(
        "augmented-robustness",
        "With Cutout, Mixup, CutMix or label smoothing, ENC is more robust to FGSM",
        "+6.26 points under FGSM on average (table 3)",
        _AUGMENTED,
        metrics.FGSM,
        effect=6.26,
        elsewhere={"g2": (_TWO_AUGMENTED, 3.55)},
    ),
    Claim(
        "alpha",
        "A learnable alpha does worse than alpha 1",
        "-0.36 points (table 5)",
        _versus("enc-alearn", ENC),
        metrics.TOP1,
        effect=-0.36,
    ),
)

# Cells that differ in the decay of the plain network alone, ascending, by arena; and what is judged by their order.
DECAYS = {
    "quarter": {"wd0": 0.0, "wd1e-8": 1e-8, "wd1e-6": 1e-6, PLAIN: 1e-4, "wd1e-3": 1e-3, "wd1e-2": 1e-2},
    "overfit": {"wd0": 0.0, "wd1e-4": 1e-4, "wd1e-3": 1e-3, "wd3e-3": 3e-3, PLAIN: 8.5e-3, "wd3e-2": 3e-2},
    "g1": {"wd0": 0.0, "wd1e-4": 1e-4, "wd5e-4": 5e-4, "wd1e-3": 1e-3, PLAIN: 4e-3, "wd1e-2": 1e-2},
}
DECAY_TITLE = "More weight decay, smaller GBR"
DECAY_PAPER = "figure 1; the larger lambda, the smaller the GBR"
NEEDED_EFOLDS = 1.0  # at the largest decay, below which decay hardly acts and the claim cannot be tested

_OTHER_DECAYS = ("1e-4", "5e-4", "1e-3")
_UNDER = ("cutmix", "ls", "cutmix-ls")
# Questions that the paper does not ask: what each part does. No claim, hence no verdict.
PARTS = (
    ("the classifier's batch norm, on the plain network", _versus("bn", PLAIN)),
    ("the epsilon shift, under ENC", _versus(ENC, "enc-ws-noshift")),
    ("batch norm's eps (1e-12 for 1e-5), under ENC", _versus("enc-ws-bneps", ENC)),
    ("the constraint on the classifier, without its batch norm", _versus("enc-ws-nobn", "ws")),
    ("removed row means, with the classifier's batch norm", _versus("ws-bn", "bn")),
    ("the constraint, on weight standardization + classifier BN", _versus(ENC, "ws-bn")),
    ("all of ENC but the classifier's batch norm", _versus(ENC, "bn")),
    *((f"all of ENC, at decay {at}", _versus(f"{ENC}-wd{at}", f"wd{at}")) for at in _OTHER_DECAYS),
    *(
        (f"all of ENC but its classifier BN, at decay {at}", _versus(f"{ENC}-wd{at}", f"bn-wd{at}"))
        for at in _OTHER_DECAYS
    ),
    *((f"the constraint, at decay {at}", _versus(f"{ENC}-wd{at}", f"ws-bn-wd{at}")) for at in _OTHER_DECAYS),
    *((f"all of ENC, under {name}", _versus(f"enc-{name}", name)) for name in _UNDER),
    *((f"the constraint, under {name}", _versus(f"enc-{name}", f"ws-bn-{name}")) for name in _UNDER),
)
NOT_TESTED = "SE, ResNeXt and DenseNet networks, Dropout, DropBlock, 300 epochs, ImageNet"
