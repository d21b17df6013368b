"""Verdicts on made-up results whose truth is known."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import ROOT
from lab.study import CELLS, load_grid
from lab.study.agreement import agree, statement
from lab.study.answer import headlines, summary_table
from lab.study.claims import CLAIMS, DECAYS, PARTS
from lab.study.figures import _series
from lab.study.frontier import beats, frontier_section
from lab.study.grid import cell_efolds
from lab.study.pages import all_sections
from lab.study.projection_rule import FORMS, decision
from lab.study.results import EPOCHS_TO_90, FGSM, GBR_LOGITS, GBR_MARGIN, LOG_PRODUCT, TOP1, Results, load_results
from lab.study.statistics import Interval, interval
from lab.study.verdicts import ABSENT, HOLDS, NOT_TESTABLE, OPPOSITE, UNDECIDED, compare, decide

GRID = load_grid(CELLS)


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
            "train_margin": 2.0,
            "norms": {"map_log_product": 9.0, "sum_sq_free": 800.0},
            **{f"fgsm/top1_eps{eps}": 20.0 for eps in (1, 2, 4, 8)},
            **final,
        },
        "measured_seconds": {"an_iteration": 0.4},
        "seconds": {"cpu": 100.0, "wall": 100.0},
        "provenance": {"commit": "0123456789ab"},
    }


def results(*runs):
    return Results(GRID, {run["id"]: run for run in runs})


def section_of(found, name):
    return next(section for section in all_sections(found) if section.name == name)


def two_cells(plain, enc, **more):
    """Runs of the plain network and of ENC with these top-1 accuracies."""
    runs = [made_up(seed=seed, top1=top1) for seed, top1 in enumerate(plain)]
    return results(*runs, *(made_up(cell="enc-ws", seed=seed, top1=top1, **more) for seed, top1 in enumerate(enc)))


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.1, 0.5, HOLDS),
        (0.1, 2.0, HOLDS),
        (-0.5, -0.1, OPPOSITE),
        (-0.5, 0.5, ABSENT),
        (-0.5, 1.5, UNDECIDED),
        (-3.0, 0.5, ABSENT),
    ],
)
def test_words_go_by_no_effect_and_the_papers(low, high, word):
    found = Interval((low + high) / 2, low, high, 3)
    assert decide(found, effect=0.9) == word
    assert decide(Interval(-found.mean, -high, -low, 3), effect=-0.9) == word


@given(st.floats(-3, 3), st.floats(0.01, 3), st.floats(0.1, 3))
def test_ratios_are_judged_as_their_logarithms_are(mean, half, effect):
    plain = Interval(mean, mean - half, mean + half, 4)
    factor = Interval(*(math.exp(x) for x in (mean, mean - half, mean + half)), 4)
    assert decide(factor, math.exp(effect), ratio=True) == decide(plain, effect)


@pytest.mark.parametrize("found", [None, Interval(5.0, 4.0, 6.0, 2), Interval(5.0, float("nan"), float("nan"), 1)])
def test_fewer_than_three_seeds_decide_nothing(found):
    assert decide(found, effect=0.9) == NOT_TESTABLE


def test_a_claim_has_one_word_and_one_effect_in_each_arena_that_plans_it():
    found = two_cells([60.0, 60.2, 59.8], [61.0, 61.2, 60.8])
    verdicts = section_of(found, "accuracy").verdicts
    assert set(verdicts) == {"quarter", "overfit", "full", "digits"}
    assert verdicts["quarter"].word == HOLDS
    assert verdicts["quarter"].effect.startswith("+1.00 [")
    assert {verdicts[arena].word for arena in ("overfit", "full", "digits")} == {NOT_TESTABLE}


def test_seeds_are_not_paired():
    """Pairs would all differ by 0.5; as independent samples they do not differ visibly."""
    found = two_cells([60.0, 62.0, 64.0], [60.5, 62.5, 64.5])
    assert section_of(found, "accuracy").verdicts["quarter"].word == UNDECIDED


def test_gbr_is_compared_by_ratio():
    runs = [made_up(seed=s, gbr=10.0 + s) for s in range(3)]
    runs += [made_up(cell="enc-ws", seed=s, gbr=2 * (10.0 + s)) for s in range(3)]
    found = compare(results(*runs), "quarter", ((1, "enc-ws"), (-1, "baseline")), GBR_LOGITS)
    assert found.effect.mean == pytest.approx(2.0)
    assert section_of(results(*runs), "gbr").verdicts["quarter"].word == OPPOSITE


def test_gbr_over_squared_margin_is_free_of_the_scale_of_the_logits():
    small, large = made_up(gbr=10.0, train_margin=2.0), made_up(gbr=90.0, train_margin=6.0)
    assert GBR_MARGIN.read(small) == pytest.approx(GBR_MARGIN.read(large))
    assert GBR_MARGIN.read(made_up(train_margin=-0.1)) is None


def test_an_average_over_four_pairs_is_their_mean_difference():
    runs = []
    for gain, name in enumerate(("cutout", "mixup", "cutmix", "ls")):
        for seed in range(3):
            runs.append(made_up(cell=name, seed=seed, top1=60.0 + seed / 10))
            runs.append(made_up(cell=f"enc-{name}", seed=seed, top1=60.0 + gain + seed / 10))
    verdict = section_of(results(*runs), "augmentations").verdicts["quarter"]
    assert (verdict.word, verdict.effect.split()[0]) == (HOLDS, "+1.50")


def test_every_claim_is_a_contrast_of_planned_cells():
    for claim in CLAIMS:
        assert sum(weight for weight, _ in claim.terms) == pytest.approx(0), claim.name
        assert any(all(grid_has(arena, cell) for _, cell in claim.terms) for arena in GRID.arenas), claim.name
        for arena, (terms, _) in claim.elsewhere.items():
            assert sum(weight for weight, _ in terms) == pytest.approx(0), claim.name
            assert all(grid_has(arena, cell) for _, cell in terms), claim.name
        assert claim.effect != (1 if claim.metric.as_ratio else 0), claim.name
    assert len(CLAIMS) + 1 <= 12, "the README's table fits on one screen"
    for _, terms in PARTS:
        assert any(all(grid_has(arena, cell) for _, cell in terms) for arena in GRID.arenas)


def complete(arena, top1_of):
    """A finished run for each planned one of an arena, with these accuracies by cell, a little apart by seed."""
    runs = GRID.runs([arena])
    return [made_up(arena, run.cell.name, run.seed, top1_of(run.cell.name) + run.seed / 100) for run in runs]


def cells_of(found, claim):
    """The row of a claim by arena."""
    head, rows = summary_table(found, all_sections(found))
    arenas = [column.removesuffix(" so far") for column in head]
    return dict(zip(arenas, next(row for row in rows if row[0].startswith(claim)), strict=True))


def test_an_arena_for_a_gpu_is_shown_once_it_has_runs():
    plain = made_up()
    assert "g1" not in cells_of(results(plain), "ENC raises")
    assert cells_of(results(plain, made_up("g1")), "ENC raises")["g1"] == "not run yet"
    assert "g0" not in cells_of(results(plain, made_up("g0")), "ENC raises")


def test_a_complete_arena_for_a_gpu_stands_in_the_place_of_those_that_ask_with_less_if_both_ways_agree():
    both = [*complete("quarter", lambda cell: 60.0), *complete("g0", lambda cell: 60.0)]
    block = complete("g1", lambda cell: 81.0 if cell == "enc-ws" else 80.0)
    done = results(*both, *block, made_up("full"), made_up("overfit"))
    row = cells_of(done, "ENC raises")
    assert "overfit" not in row
    assert row["full"] == "see g1"
    assert row["g1"].startswith("**holds** +1.00 [")
    for runs in ([*both, *block[:-1]], block, [*both, *complete("g0", lambda cell: 62.0), *block]):
        row = cells_of(results(*runs), "ENC raises")
        assert row["full"] == row["overfit"] == "not run yet"
    # What the arena does not ask stays where it was.
    assert cells_of(done, "ENC beats weight")["full"] == "not run yet"


def test_a_claim_about_augmentations_is_judged_on_those_that_an_arena_has():
    gains = {"enc-cutmix": 1.0, "enc-ls": 0.2}
    verdict = section_of(results(*complete("g2", lambda cell: 80 + gains.get(cell, 0))), "augmentations").verdicts["g2"]
    assert (verdict.word, verdict.effect.split()[0]) == (HOLDS, "+0.60")


@pytest.mark.parametrize(
    ("gain", "spread", "said"),
    [
        (0.0, 1, "both ways of training agree, accuracy within 0.01 points"),
        (0.0, 150, "both ways of training are not shown to agree, accuracy within 1.79"),  # too wide an interval
        (0.5, 1, "both ways of training are not shown to agree, accuracy within 0.5"),  # one that excludes 0
    ],
)
def test_both_ways_of_training_agree_if_the_interval_says_so(gain, spread, said):
    runs = [
        made_up(arena, cell.name, seed, 60 + spread * seed / 100 + gain * (arena == "g0"))
        for cell in GRID.cells["g0"]
        for arena in ("g0", "quarter")
        for seed in range(5)
    ]
    found = results(*runs)
    assert statement(found, "g0").startswith(said)
    assert agree(found) == ("training agree" in said)


def test_nothing_agrees_before_it_has_run():
    assert statement(results(), "g0") == "not run yet"
    assert not agree(results())


def test_a_method_is_beaten_by_one_that_is_better_both_clean_and_under_pgd():
    cells = {"plain": (80, 5), "wd4e-3": (82, 9), "noise0.1": (78, 20), "enc-wd1e-3": (84, 4)}
    runs = [
        made_up("g4", cell, seed, clean + seed / 100, **{"pgd10/top1_eps2": attacked + seed / 100})
        for cell, (clean, attacked) in cells.items()
        for seed in range(3)
    ]
    found = results(*runs)
    assert [cell for cell in cells if any(beats(found, other, cell) for other in cells)] == ["plain"]
    (_, _, rows) = frontier_section(found).tables[0]
    assert [row[-1] for row in rows] == ["plain, decay 4e-3", "none", "none", "none"]


def grid_has(arena, name):
    return any(cell.name == name for cell in GRID.cells[arena])


def decay_runs(arena, gbr_of, seeds=3):
    return [
        made_up(arena=arena, cell=cell, seed=seed, gbr=gbr_of(rank) + seed / 100)
        for rank, cell in enumerate(DECAYS[arena])
        for seed in range(seeds)
    ]


def test_decay_is_judged_by_the_order_of_all_runs():
    assert section_of(results(*decay_runs("overfit", lambda r: 10.0 - r)), "decay").verdicts["overfit"].word == HOLDS
    assert section_of(results(*decay_runs("overfit", lambda r: 10.0 + r)), "decay").verdicts["overfit"].word == OPPOSITE
    flat = section_of(results(*decay_runs("overfit", lambda r: 10.0 + r % 2)), "decay")
    assert flat.verdicts["overfit"].word == UNDECIDED


def test_a_decay_with_two_seeds_does_not_count_yet():
    falling = decay_runs("overfit", lambda r: 10.0 - r, seeds=2)
    assert section_of(results(*falling), "decay").verdicts["overfit"].effect == ""
    ends = [run for run in decay_runs("overfit", lambda r: 10.0 + r) if run["cell"] in ("wd0", "wd3e-2")]
    some = [run for run in falling if run["cell"] not in ("wd0", "wd3e-2")]
    verdict = section_of(results(*ends, *some), "decay").verdicts["overfit"]
    assert verdict.effect.startswith("rho +0.88 (")
    assert "6 runs" in verdict.effect


def test_the_decays_are_those_of_the_cells():
    for arena, decays in DECAYS.items():
        for cell in GRID.cells[arena]:
            if cell.name in decays:
                (run,) = [run for run in GRID.runs([f"{arena}/{cell.name}"]) if run.seed == 0]
                assert run.config(ROOT).optim_wrapper.optimizer.weight_decay == decays[cell.name]


def test_the_arena_overfit_has_the_e_folds_of_the_papers_recipe():
    efolds = {arena: cell_efolds(cells[0]) for arena, cells in GRID.cells.items()}
    assert efolds["overfit"] == pytest.approx(33.3, abs=0.2)
    assert max(efolds[arena] for arena in ("quarter", "full", "digits")) < 1
    assert min(efolds[arena] for arena in ("g1", "g2", "g3")) > 31


def test_cells_of_a_class_are_pooled():
    runs = [made_up(cell=cell, seed=s, top1=60 + s / 10) for cell in ("bn", "enc-wn") for s in range(3)]
    runs += [made_up(cell=cell, seed=s, top1=63 + s / 10) for cell in ("enc-ws", "ws-bn") for s in range(3)]
    section = section_of(results(*runs), "classes")
    (_, _, rows) = section.tables[0]
    assert [row[2] for row in rows] == ["6", "6"]
    assert any("removed means, with the classifier's batch norm: +3.00" in line for line in section.text)


def test_the_best_learning_rates_meet():
    tops = {"baseline": 60, "lr0.03": 62, "lr0.3": 58, "enc-ws": 61, "enc-ws-lr0.03": 59, "enc-ws-lr0.3": 63}
    runs = [made_up(cell=c, seed=s, top1=t + s / 10) for c, t in tops.items() for s in range(3)]
    (_, _, rows) = section_of(results(*runs), "learning-rates").tables[-1]
    assert rows[0][1:3] == ["ENC, lr 0.3", "plain, lr 0.03"]
    assert rows[0][3].startswith("+1.00")


def test_norms_that_are_not_available_count_nowhere():
    norms = {"sum_sq_free": 800.0, "not_available": "why"}
    found = results(*(made_up(cell="ws", seed=s, norms=norms) for s in range(3)))
    assert found.values("quarter", "ws", LOG_PRODUCT) == []
    assert len(found.values("quarter", "ws", TOP1)) == 3


def test_the_headlines_hold_every_claim_and_what_was_not_tested():
    found = two_cells([60.0, 60.2, 59.8], [61.0, 61.2, 60.8])
    lines = headlines(found, all_sections(found)).splitlines()
    assert len(lines) == 2 + len(CLAIMS) + 1 + 1
    assert "| +0.90 points of top-1 (table 1) | **holds** +1.00" in lines[2]
    assert lines[-1].startswith("| Not tested | SE, ")
    assert all(len(line) <= 200 for line in lines)


@pytest.mark.parametrize(
    ("points", "epochs"),
    [
        ([[3, 20.0], [6, 60.0], [9, 80.0]], 6 + 3 * 12 / 20),  # 72 lies between 60 and 80
        ([[3, 75.0], [6, 40.0], [9, 80.0]], 3),  # the first time counts, and before it nothing is known
        ([[3, None], [6, 60.0], [9, 80.0]], None),
        ([], None),
    ],
)
def test_epochs_to_90_percent_are_read_off_the_validation_curve(points, epochs):
    run = made_up(top1=80.0)
    run["by_epoch"]["accuracy/top1"] = points
    assert EPOCHS_TO_90.read(run) == (None if epochs is None else pytest.approx(epochs))


def projected(retract, enc=(61.0, 61.2, 60.8, 61.1), **more):
    """Runs of ENC layers and of weights that are retracted, with these top-1 accuracies."""
    cells = {"enc-ws": enc, "enc-retract": retract, "bn": enc}
    return [
        made_up("overfit", cell, seed, top1, **{"pgd10/top1_eps2": 5.0 + seed / 10}, **(more if "t" in cell else {}))
        for cell, values in cells.items()
        for seed, top1 in enumerate(values)
    ]


def test_a_projection_is_recommended_unless_an_interval_lies_on_its_worse_side():
    assert decision(results(*projected([61.0, 61.1, 60.9])), "enc-retract").startswith("recommended")
    assert decision(results(*projected([60.0, 60.1, 59.9])), "enc-retract") == (
        "an option: worse in top-1 accuracy (%) (overfit)"
    )
    assert decision(results(*projected([61.0, 61.1, 60.9], gbr=20.0)), "enc-retract") == (
        "an option: worse in GBR of the logits (overfit), GBR of the logits / squared median margin (overfit)"
    )
    assert decision(results(*projected([61.0, 61.1, 60.9], gbr=5.0)), "enc-retract").startswith("recommended")


def test_a_projection_is_not_judged_by_an_arena_before_all_its_runs_are_done():
    runs = projected([60.0, 60.1, 59.9])
    assert decision(results(*runs[:-5], *runs[-4:]), "enc-retract") == "not decided yet"
    begun = made_up("g5", "enc-retract", 4, 60.0)
    assert decision(results(*projected([61.0, 61.1, 60.9]), begun), "enc-retract") == "not decided yet"
    assert decision(results(*runs, begun), "enc-retract") == "an option: worse in top-1 accuracy (%) (overfit)"
    assert {decision(results(), form) for form in FORMS} == {"not decided yet"}
    lost = made_up("overfit", "enc-rotate", status="diverged")
    assert decision(results(*runs, lost), "enc-rotate") == "an option: a run has diverged"


def test_fgsm_is_averaged_over_the_eps_that_were_run():
    run = made_up(**{f"fgsm/top1_eps{eps}": 10.0 * eps for eps in (1, 2, 4, 8)})
    assert FGSM.read(run) == pytest.approx(37.5)
    run["final"]["fgsm/top1_eps8"] = None
    assert FGSM.read(run) is None


def test_sections_stand_without_any_run():
    for section in all_sections(results()):
        assert {verdict.word for verdict in section.verdicts.values()} <= {NOT_TESTABLE}, section.name


def test_diverged_runs_count_in_no_mean_and_are_listed():
    lost = made_up(cell="wd0", status="diverged", top1=10.0)
    found = results(lost, made_up())
    assert found.values("quarter", "wd0", TOP1) == []
    assert found.with_status("diverged") == [lost]


def test_a_result_outside_the_grid_is_refused(tmp_path):
    run = made_up(cell="forgotten")
    (tmp_path / "quarter").mkdir()
    (tmp_path / "quarter" / "forgotten-seed0.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="'quarter/forgotten-seed0', which the grid does not plan"):
        load_results(GRID, tmp_path)


def test_bands_of_percentages_stay_within_0_to_100_and_need_three_runs():
    band = _series("plain", {1: [90.0, 99.0, 99.0], 2: [60.0, 80.0]})
    assert band["high"][0] == 100.0
    assert band["low"][0] == pytest.approx(interval([90.0, 99.0, 99.0]).low)
    assert (band["mean"][1], band["low"][1], band["high"][1]) == (70.0, None, None)
