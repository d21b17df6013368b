"""Verdicts on made-up results whose truth is known."""

from __future__ import annotations

import json

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from enc_plugin.study import load_grid
from enc_plugin.study.claims import (
    CONTRADICTED,
    NOT_RUN,
    REPRODUCED,
    UNDECIDED,
    compare,
    joint_verdict,
    sections,
)
from enc_plugin.study.report import headlines
from enc_plugin.study.results import (
    FREE_NORM,
    GBR_LOGITS,
    GBR_PROBS,
    LOG_PRODUCT,
    TOP1,
    TRAIN_LOSS,
    Results,
    load_results,
)

GRID = load_grid(ROOT / "study" / "grid.py")


def made_up(arena="quarter", cell="baseline", seed=0, top1=60.0, gbr=10.0, status="finished", **final):
    return {
        "id": f"{arena}/{cell}-seed{seed}",
        "arena": arena,
        "cell": cell,
        "seed": seed,
        "epochs": 10,
        "status": status,
        "by_epoch": {"accuracy/top1": [[5, top1 / 2], [10, top1]], "gbr/logits": [[0, 1.0], [10, gbr]]},
        "final": {
            "top1": top1,
            "gbr/logits": gbr,
            "gbr/probs": gbr / 100,
            "test_loss": 1.0,
            "train_loss": 0.5,
            "norms": {"kernel_slack": 1.0, "map_slack": 1.0, "map_log_product": 9.0, "sum_sq_free": 800.0},
            **{f"fgsm/top1_eps{eps}": 20.0 for eps in (1, 2, 4, 8)},
            **final,
        },
        "measured_seconds": {"an_iteration": 0.4},
        "seconds": {"cpu": 100.0, "wall": 100.0},
        "provenance": {"commit": "0123456789ab"},
    }


def results(*runs):
    return Results(GRID, {run["id"]: run for run in runs})


def pairs_of(differences, cell="enc-ws", **base):
    """Runs of the baseline and a cell whose top-1 differs by the given amounts, seed by seed."""
    runs = []
    for seed, difference in enumerate(differences):
        runs.append(made_up(seed=seed, top1=60.0 + seed, **base))
        runs.append(made_up(cell=cell, seed=seed, top1=60.0 + seed + difference, **base))
    return results(*runs)


def verdict(found, claimed=1):
    (comparison,) = compare(found, "quarter", [("enc-ws", "baseline")], [TOP1], claimed)
    return comparison.verdict


def test_a_clear_gain_is_reproduced_and_a_clear_loss_is_not():
    assert verdict(pairs_of([1.0, 1.1, 0.9])) == REPRODUCED
    assert verdict(pairs_of([-1.0, -1.1, -0.9])) == CONTRADICTED
    assert verdict(pairs_of([-1.0, -1.1, -0.9]), claimed=-1) == REPRODUCED


def test_an_interval_around_zero_decides_nothing():
    assert verdict(pairs_of([1.0, -1.0, 0.5])) == UNDECIDED


def test_one_seed_decides_nothing():
    assert verdict(pairs_of([5.0])) == UNDECIDED


def test_seeds_differ_more_than_pairs():
    """Unpaired, 60, 61, 62 against 60.5, 61.5, 62.5 would be noise."""
    assert verdict(pairs_of([0.5, 0.52, 0.48])) == REPRODUCED


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=5))
def test_the_opposite_data_give_the_opposite_verdict(differences):
    opposite = {REPRODUCED: CONTRADICTED, CONTRADICTED: REPRODUCED, UNDECIDED: UNDECIDED}
    assert verdict(pairs_of([-d for d in differences])) == opposite[verdict(pairs_of(differences))]


def test_gbr_is_compared_by_ratio():
    runs = [made_up(seed=s, gbr=10.0 + s) for s in range(3)]
    runs += [made_up(cell="enc-ws", seed=s, gbr=2 * (10.0 + s)) for s in range(3)]
    (found,) = compare(results(*runs), "quarter", [("enc-ws", "baseline")], [GBR_LOGITS], -1)
    assert found.effect.mean == pytest.approx(2.0)
    assert found.verdict == CONTRADICTED


def test_a_joint_claim_needs_all_its_parts():
    good, bad = pairs_of([1.0, 1.1, 0.9]), pairs_of([-1.0, -1.1, -0.9])
    open_ = pairs_of([1.0, -1.0, 0.5])
    parts = {
        name: compare(data, "quarter", [("enc-ws", "baseline")], [TOP1], 1)
        for name, data in (("good", good), ("bad", bad), ("open", open_))
    }
    assert joint_verdict(parts["good"]) == REPRODUCED
    assert joint_verdict(parts["good"] + parts["open"]) == UNDECIDED
    assert joint_verdict(parts["good"] + parts["open"] + parts["bad"]) == CONTRADICTED
    assert joint_verdict(parts["bad"] + 19 * parts["open"]) == UNDECIDED  # p = 0.003: one of twenty by chance
    assert joint_verdict(compare(results(), "quarter", [("enc-ws", "baseline")], [TOP1], 1)) == NOT_RUN


def decay_runs(gbr_of):
    cells = {"wd0": 0, "wd1e-8": 1, "wd1e-6": 2, "baseline": 3, "wd1e-3": 4, "wd1e-2": 5}
    return [
        made_up(cell=cell, seed=seed, gbr=gbr_of(rank) + seed / 100)
        for cell, rank in cells.items()
        for seed in range(3)
    ]


def test_decay_is_judged_by_the_order_of_all_runs():
    falling = next(s for s in sections(results(*decay_runs(lambda rank: 10.0 - rank))) if s.name == "decay")
    assert falling.verdicts == {"quarter": REPRODUCED}
    rising = next(s for s in sections(results(*decay_runs(lambda rank: 10.0 + rank))) if s.name == "decay")
    assert rising.verdicts == {"quarter": CONTRADICTED}
    some = [run for run in decay_runs(lambda rank: 10.0 - rank) if run["cell"] != "wd0"]
    assert next(s for s in sections(results(*some)) if s.name == "decay").verdicts == {"quarter": UNDECIDED}


def test_decay_that_lowers_the_bound_alone_is_seen_link_by_link():
    norms = {"wd0": (1500.0, 185.0), "wd1e-2": (40.0, 150.0)}
    runs = [
        made_up(cell=c, seed=s, norms={"sum_sq_free": n + s, "map_log_product": p + s / 10})
        for c, (n, p) in norms.items()
        for s in range(3)
    ]
    section = next(s for s in sections(results(*runs)) if s.name == "decay")
    seen = {c.metric: c.verdict for c in section.comparisons if c.cell == "wd1e-2"}
    assert seen == {
        FREE_NORM: "smaller",
        LOG_PRODUCT: "smaller",
        GBR_LOGITS: "no difference seen",
        GBR_PROBS: "no difference seen",
    }
    assert section.verdicts == {"quarter": UNDECIDED}


def test_a_headline_shows_what_decides():
    def line(eps8):
        """Robustness of three pairs that differ under FGSM 1/255, clearly or not under 8/255 alone."""
        runs = []
        for seed in range(3):
            runs.append(made_up(seed=seed, **{"fgsm/top1_eps1": 40.0, "fgsm/top1_eps8": 5.0}))
            more = {"fgsm/top1_eps1": 43.0 + seed, "fgsm/top1_eps8": 5.0 + eps8[seed]}
            runs.append(made_up(cell="enc-ws", seed=seed, **more))
        found = results(*runs)
        lines = headlines(found, sections(found), "study").splitlines()
        return next(text for text in lines if "robust" in text)

    assert "top-1 accuracy under FGSM 8/255 (%) -1.00" in line([-1.0, -1.01, -0.99])  # contradicts, the mean does not
    assert "8/255" not in line([-5.0, 0.0, 5.0])  # the mean itself does not decide


def test_a_better_fit_is_no_smaller_gap():
    runs = []
    for seed in range(3):
        loss = 0.5 + seed / 10
        runs += [
            made_up(seed=seed, train_loss=loss, test_loss=loss + 0.4),
            made_up(cell="bn", seed=seed, train_loss=loss, test_loss=loss + 0.4),
            made_up(cell="enc-ws", seed=seed, train_loss=loss - 0.3, test_loss=loss + 0.1 + (0.01, -0.01, 0.0)[seed]),
        ]
    section = next(s for s in sections(results(*runs)) if s.name == "gap")
    assert section.verdicts["quarter"] == UNDECIDED
    fit = next(c for c in section.comparisons if c.metric is TRAIN_LOSS and c.effect is not None)
    assert (fit.effect.mean, fit.verdict) == (pytest.approx(-0.3), "smaller")
    for run in runs:
        if run["cell"] == "enc-ws":
            run["final"]["test_loss"] -= 0.2
    section = next(s for s in sections(results(*runs)) if s.name == "gap")
    assert section.verdicts["quarter"] == REPRODUCED


def test_a_learnable_alpha_that_is_not_the_worst_contradicts():
    tops = {"enc-ws": 65, "enc-a0.5": 61, "enc-a2": 63, "enc-alearn": 62}
    runs = [made_up(cell=c, seed=s, top1=t + s / 10) for c, t in tops.items() for s in range(3)]
    assert next(s for s in sections(results(*runs)) if s.name == "alpha").verdicts["quarter"] == CONTRADICTED


def test_the_best_learning_rates_meet():
    tops = {"baseline": 60, "lr0.03": 62, "lr0.3": 58, "enc-ws": 61, "enc-ws-lr0.03": 59, "enc-ws-lr0.3": 63}
    runs = [made_up(cell=c, seed=s, top1=t + s / 10) for c, t in tops.items() for s in range(3)]
    section = next(s for s in sections(results(*runs)) if s.name == "learning-rates")
    (comparison,) = section.comparisons
    assert (comparison.cell, comparison.other) == ("enc-ws-lr0.3", "lr0.03")
    assert comparison.effect.mean == pytest.approx(1.0)


def test_sections_stand_without_any_run():
    for section in sections(results()):
        assert set(section.verdicts.values()) <= {NOT_RUN}, section.name


def test_diverged_runs_count_in_no_mean_and_are_listed():
    lost = made_up(cell="wd0", status="diverged", top1=10.0)
    found = results(lost, made_up())
    assert found.values("quarter", "wd0", TOP1) == {}
    assert found.with_status("diverged") == [lost]
    section = next(s for s in sections(found) if s.name == "decay")
    assert any("quarter/wd0-seed0" in line for line in section.text)


def test_a_result_outside_the_grid_is_refused(tmp_path):
    run = made_up(cell="forgotten")
    (tmp_path / "quarter").mkdir()
    (tmp_path / "quarter" / "forgotten-seed0.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="'quarter/forgotten-seed0', which the grid does not plan"):
        load_results(GRID, tmp_path)
