"""Every word and effect of the study's table, computed again from the JSON files by scipy alone."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from lab import RESULTS

STUDY = RESULTS / "study"
ENC_TO_PLAIN = {"enc-ws": 1, "baseline": -1}
FOUR = {
    f"{enc}{name}": sign / 4 for name in ("cutout", "mixup", "cutmix", "ls") for enc, sign in (("enc-", 1), ("", -1))
}


def early(result):
    return np.mean([top1 for epoch, top1 in result["by_epoch"]["accuracy/top1"] if epoch <= result["epochs"] / 2])


def fgsm(result):
    return np.mean([value for key, value in result["final"].items() if key.startswith("fgsm/top1_eps")])


def final(key):
    return lambda result: result["final"][key]


def gbr_over_margin(result):
    return result["final"]["gbr/logits"] / result["final"]["train_margin"] ** 2


AUGMENTED = "With Cutout, Mixup, CutMix or label smoothing, ENC"
# Beginning of the row, cells with weights, measure, the paper's effect (of a ratio its logarithm), whether a ratio.
ROWS = [
    ("ENC raises the accuracy", ENC_TO_PLAIN, final("top1"), 0.90, False),
    ("ENC 'wn' (eq. 21)", {"enc-wn": 1, "baseline": -1}, final("top1"), 0.71, False),
    ("ENC beats weight", {"enc-ws": 1, "ws": -1}, final("top1"), 0.70, False),
    ("ENC learns faster", ENC_TO_PLAIN, early, 1.0, False),
    ("ENC ends with a smaller GBR", ENC_TO_PLAIN, final("gbr/logits"), math.log(0.8), True),
    ("... also relative to the squared margin", ENC_TO_PLAIN, gbr_over_margin, math.log(0.8), True),
    ("ENC is more robust", ENC_TO_PLAIN, fgsm, 12.33, False),
    (f"{AUGMENTED} raises the accuracy", FOUR, final("top1"), 0.945, False),
    ("ENC with CutMix and label smoothing", {"enc-cutmix-ls": 1, "enc-ws": -1}, final("top1"), 0.52, False),
    (f"{AUGMENTED} is more robust", FOUR, fgsm, 6.26, False),
    ("A learnable alpha", {"enc-alearn": 1, "enc-ws": -1}, final("top1"), -0.36, False),
]
# Arenas that have other cells for a row: these with weights, and the paper's effect.
TWO = {f"{enc}{name}": sign / 2 for name in ("cutmix", "ls") for enc, sign in (("enc-", 1), ("", -1))}
ELSEWHERE = {
    (f"{AUGMENTED} raises the accuracy", "g2"): (TWO, 0.995),
    (f"{AUGMENTED} is more robust", "g2"): (TWO, 3.55),
}
DECAYS = {
    "quarter": {"wd0": 0, "wd1e-8": 1e-8, "wd1e-6": 1e-6, "baseline": 1e-4, "wd1e-3": 1e-3, "wd1e-2": 1e-2},
    "overfit": {"wd0": 0, "wd1e-4": 1e-4, "wd1e-3": 1e-3, "wd3e-3": 3e-3, "baseline": 8.5e-3, "wd3e-2": 3e-2},
    "g1": {"wd0": 0, "wd1e-4": 1e-4, "wd5e-4": 5e-4, "wd1e-3": 1e-3, "baseline": 4e-3, "wd1e-2": 1e-2},
}


def finished(arena, cell):
    runs = [json.loads(path.read_text()) for path in sorted((STUDY / "runs" / arena).glob(f"{cell}-seed*.json"))]
    return [run for run in runs if run["status"] == "finished"]


def welch(cells):
    """Estimate and 95 % interval of a weighted sum of means; two cells by scipy's own test."""
    if sorted(weight for weight, _ in cells) == [-1, 1]:
        (a,), (b,) = ([v for w, v in cells if w == sign] for sign in (1, -1))
        test = stats.ttest_ind(a, b, equal_var=False)
        return np.mean(a) - np.mean(b), *test.confidence_interval(0.95)
    parts = np.array([w**2 * np.var(v, ddof=1) / len(v) for w, v in cells])
    freedom = parts.sum() ** 2 / sum(part**2 / (len(v) - 1) for part, (_, v) in zip(parts, cells, strict=True))
    mean = sum(w * np.mean(v) for w, v in cells)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(parts.sum())
    return mean, mean - half, mean + half


def word_of(low, high, effect):
    towards = (low, high) if effect > 0 else (-high, -low)
    if towards[0] > 0:
        return "holds"
    if towards[1] < 0:
        return "opposite"
    return "absent" if towards[1] < abs(effect) else "undecided"


def table():
    lines = (STUDY / "README.md").read_text().splitlines()
    head, rows = [], {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == ["claim", "paper"]:
            head = [arena.removesuffix(" so far") for arena in cells[2:]]
        elif head and line.startswith("|") and not set(cells) <= {"---"}:
            rows[cells[0]] = dict(zip(head, cells[2:], strict=True))
        elif head and not line.startswith("|"):
            return rows
    raise AssertionError("the page opens with the table")


@pytest.mark.parametrize(("title", "cells", "measure", "effect", "ratio"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_table_follows_from_the_files(title, cells, measure, effect, ratio):
    (row,) = [row for name, row in table().items() if name.startswith(title)]
    decided, asked = 0, (cells, effect)
    for arena, shown in row.items():
        cells, effect = ELSEWHERE.get((title, arena), asked)
        match = re.fullmatch(r"\*\*(.+)\*\* x?(\S+)(?: \[(\S+), (\S+)\]| \(one seed\))", shown)
        if match is None:
            assert shown in ("", "**not testable**", "not run yet") or shown.startswith("see g"), arena
            continue
        values = {cell: [measure(run) for run in finished(arena, cell)] for cell in cells}
        mean, low, high = welch([(cells[cell], np.log(v) if ratio else np.array(v)) for cell, v in values.items()])
        want = np.exp([mean, low, high]) if ratio else [mean, low, high]
        numbers = [float(x) for x in match.groups()[1:] if x]
        assert numbers == pytest.approx(want[: len(numbers)], rel=6e-3, abs=6e-3), arena
        has_few = min(map(len, values.values())) < 3
        assert match[1] == ("not testable" if has_few else word_of(low, high, effect)), arena
        decided += not has_few
    assert decided or title.startswith("..."), "no arena has decided this yet"


def test_the_table_has_no_other_row_but_that_of_decay_and_what_was_not_tested():
    *claims, last = table()
    assert len(claims) == len(ROWS) + 1 <= 12
    assert "More weight decay, smaller GBR" in claims
    assert last == "Not tested"


@pytest.mark.parametrize("arena", DECAYS)
def test_the_decay_row_follows_from_the_files(arena):
    runs = [
        (decay, run["final"]["gbr/logits"])
        for cell, decay in DECAYS[arena].items()
        for run in finished(arena, cell)
        if len(finished(arena, cell)) > 2
    ]
    rho = stats.spearmanr(*zip(*runs, strict=True)).statistic if len(runs) > 2 else math.nan
    shown = table()["More weight decay, smaller GBR"].get(arena, "")  # an arena without runs has no column
    if math.isfinite(rho):
        assert f"rho {rho:+.2f} (" in shown
        assert f", {len(runs)} runs," in shown
    else:
        assert "rho" not in shown
