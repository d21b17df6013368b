"""The question whether ENC as a projection is as good as ENC layers, and the rule that decides what is recommended."""

from __future__ import annotations

from . import results as metrics
from .claims import ENC
from .execute import DIVERGED
from .results import Results
from .sections import Section, contrast_table, found_contrasts
from .verdicts import MIN_SEEDS, Comparison, is_planned

FORMS = {"enc-retract": "retract", "enc-rotate": "rotate"}  # cell: mode of the projection

# What is compared, and the word of a form that is worse.
WORSE = {
    metrics.TOP1: "smaller",
    metrics.GBR_LOGITS: "larger",
    metrics.GBR_MARGIN: "larger",
    metrics.FGSM: "smaller",
    metrics.PGD: "smaller",
    metrics.EPOCHS_TO_90: "larger",
}


def projection_section(results: Results) -> Section:
    """Each form against plain + batch norm and against ENC layers, and what the rule says of it."""
    section = Section(
        "projection",
        "Is ENC as a projection as good as ENC layers?",
        'Stock layers whose weights the optimizer holds on the constraint set (`how="project"`, docs/gauge.md), eq. '
        "22, against the plain network with a batch norm behind the classifier, and against ENC layers of the same "
        "decay. The rule, declared before the runs: a form is recommended only if, with at least "
        f"{MIN_SEEDS} seeds on both sides, no interval of the six measures against ENC layers lies wholly on the worse "
        "side, in any arena with its runs, and none of its runs has diverged; else it is an option with its numbers. "
        "Worse is: less accuracy, also under FGSM and PGD-10, a larger GBR, also over the squared margin, and more "
        "epochs to 90 % of the final accuracy.",
    )
    for title, other in (("Against plain + classifier BN", "bn"), ("Against ENC layers", ENC)):
        found = [c for form in FORMS for c in _against(results, form, other)]
        section.tables += contrast_table(results, found, title)
    section.text = [f"`{mode}`: {decision(results, form)}." for form, mode in FORMS.items()]
    return section


def decision(results: Results, form: str) -> str:
    """What the rule says of a form: recommended, an option and why, or not decided yet."""
    if any(run["cell"] == form for run in results.with_status(DIVERGED)):
        return "an option: a run has diverged"
    found = _against(results, form, ENC)
    begun = {run["arena"] for run in results if run["cell"] == form}
    arenas = {arena for arena in begun if is_planned(results, arena, ((1, form), (-1, ENC)))}
    to_go = {run.cell.arena.name for run in results.missing if run.cell.name in (form, ENC)}
    complete = {c.arena for c in found} - to_go - {c.arena for c in found if c.effect.n < MIN_SEEDS}
    # One complete arena is enough to fail; what the others give cannot change that.
    if worse := [f"{c.metric.name} ({c.arena})" for c in found if c.arena in complete and c.seen == WORSE[c.metric]]:
        return f"an option: worse in {', '.join(worse)}"
    if not arenas or complete != arenas:
        return "not decided yet"
    return "recommended: worse than ENC layers in no measure"


def _against(results: Results, form: str, other: str) -> list[Comparison]:
    """The contrasts of a form and another cell that have an estimate, in every arena that plans both."""
    return found_contrasts(results, [(((1, form), (-1, other)), metric) for metric in WORSE])
