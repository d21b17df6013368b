"""The claims of the paper, each as one number, declared before the runs that decide them.

``effect`` is the paper's, in the unit of the metric. Where the paper draws a curve and states no number, the effect
that would be worth having is declared in its place, and ``paper`` says so.
"""

from __future__ import annotations

from . import results as metrics
from .verdicts import Claim, Terms

ENC, PLAIN = "enc-ws", "baseline"
AUGMENTATIONS = ("cutout", "mixup", "cutmix", "ls")

_VERSUS_PLAIN: Terms = ((1, ENC), (-1, PLAIN))
_AUGMENTED: Terms = tuple(
    term
    for name in AUGMENTATIONS
    for term in ((1 / len(AUGMENTATIONS), f"enc-{name}"), (-1 / len(AUGMENTATIONS), name))
)

CLAIMS = (
    Claim(
        "accuracy",
        "ENC raises the accuracy",
        "+0.90 points of top-1 (table 1; +0.27 to +0.90 over seven networks, table 4)",
        _VERSUS_PLAIN,
        metrics.TOP1,
        effect=0.90,
    ),
    Claim(
        "norm-only",
        "Equal norms alone ('wn', eq. 21) raise it",
        "+0.71 points (table 1)",
        ((1, "enc-wn"), (-1, PLAIN)),
        metrics.TOP1,
        effect=0.71,
    ),
    Claim(
        "standardization",
        "ENC beats weight standardization",
        "+0.70 points (table 1)",
        ((1, ENC), (-1, "ws")),
        metrics.TOP1,
        effect=0.70,
    ),
    Claim(
        "convergence",
        "ENC converges faster",
        "figure 2, no number; taken as +1 point of mean accuracy over the first half of the epochs",
        _VERSUS_PLAIN,
        metrics.EARLY_TOP1,
        effect=1.0,
    ),
    Claim(
        "gbr",
        "ENC ends with a smaller GBR",
        "figure 3, no number; taken as x0.8",
        _VERSUS_PLAIN,
        metrics.GBR_LOGITS,
        effect=0.8,
    ),
    Claim(
        "gbr-margin",
        "... also in units of the margin, free of the logits' scale",
        "not measured in the paper; taken as x0.8",
        _VERSUS_PLAIN,
        metrics.GBR_MARGIN,
        effect=0.8,
    ),
    Claim(
        "robustness",
        "ENC is more robust to FGSM",
        "+12.3 points, eps not stated (table 3)",
        _VERSUS_PLAIN,
        metrics.FGSM,
        effect=12.33,
    ),
    Claim(
        "augmentations",
        "ENC adds to Cutout, Mixup, CutMix and label smoothing",
        "+0.95 points on average (table 2)",
        _AUGMENTED,
        metrics.TOP1,
        effect=0.945,
    ),
    Claim(
        "all-together",
        "ENC + CutMix + LS beats ENC",
        "+0.52 points (table 2)",
        ((1, "enc-cutmix-ls"), (-1, ENC)),
        metrics.TOP1,
        effect=0.52,
    ),
    Claim(
        "augmented-robustness",
        "ENC adds robustness to each of the four",
        "+6.26 points under FGSM on average (table 3)",
        _AUGMENTED,
        metrics.FGSM,
        effect=6.26,
    ),
    Claim(
        "alpha",
        "A learnable alpha does worse than alpha 1",
        "-0.36 points (table 5)",
        ((1, "enc-alearn"), (-1, ENC)),
        metrics.TOP1,
        effect=-0.36,
    ),
)

# Cells that differ in the decay of the plain network alone, ascending, by arena; and what is judged by their order.
DECAYS = {
    "quarter": {"wd0": 0.0, "wd1e-8": 1e-8, "wd1e-6": 1e-6, PLAIN: 1e-4, "wd1e-3": 1e-3, "wd1e-2": 1e-2},
    "overfit": {"wd0": 0.0, "wd1e-4": 1e-4, "wd1e-3": 1e-3, "wd3e-3": 3e-3, PLAIN: 8.5e-3, "wd3e-2": 3e-2},
}
DECAY_TITLE = "More weight decay, smaller GBR"
DECAY_PAPER = "figure 1: the larger lambda, the smaller the GBR"
NEEDED_EFOLDS = 1.0  # at the largest decay, below which decay hardly acts and the claim cannot be tested

# Questions that the paper does not ask: what each part does. No claim, hence no verdict.
PARTS = (
    ("the classifier's batch norm, on the plain network", ((1, "bn"), (-1, PLAIN))),
    ("the epsilon shift, under ENC", ((1, ENC), (-1, "enc-ws-noshift"))),
    ("batch norm's eps (1e-12 for 1e-5), under ENC", ((1, "enc-ws-bneps"), (-1, ENC))),
    ("the constraint on the classifier, without its batch norm", ((1, "enc-ws-nobn"), (-1, "ws"))),
    ("removed row means, with the classifier's batch norm", ((1, "ws-bn"), (-1, "bn"))),
    ("the constraint, on weight standardization + classifier BN", ((1, ENC), (-1, "ws-bn"))),
    ("all of ENC but the classifier's batch norm", ((1, ENC), (-1, "bn"))),
)
NOT_TESTED = "SE, ResNeXt and DenseNet networks, Dropout, DropBlock, 300 epochs, ImageNet"
