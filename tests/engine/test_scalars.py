"""What hooks declare of their scalars, against what a run logs and against the table in the documentation."""

from __future__ import annotations

import re

import pytest
from engine.test_no_trace import OBSERVERS
from helpers import ROOT, digits_config, scalars, train
from mmpretrain.utils import load_json_log

from enc_plugin.engine import SCALARS
from enc_plugin.engine.scalars import Scalar, declared

OWN = tuple(prefix for _, prefix in OBSERVERS.values())


def test_every_scalar_that_a_hook_of_ours_logs_is_declared(tmp_path):
    cfg = digits_config(tmp_path)
    cfg.default_hooks.enc_audit = None  # it is among the observers
    cfg.custom_hooks = [dict(type=name, **options) for name, (options, _) in OBSERVERS.items()]
    cfg.custom_hooks += [dict(type="GBRHook", num_samples=8, projections=None, name="second.curve")]
    train(cfg)
    logged = {key for line in scalars(tmp_path) for key in line if key.startswith(OWN)}
    assert len(logged) > 50
    found = {key: declared(SCALARS, key) for key in logged}
    assert [key for key, scalar in found.items() if scalar is None or scalar.name != key] == []
    beside = {name for s in found.values() for name in (s.error, *(s.band or ())) if name}
    assert beside <= logged
    assert {"gbr/logits_sem", "gbr/second.curve_sem", "enc_monitor/norm/min"} <= beside
    kinds = {s.name for s in SCALARS if s.words(next((k for k in logged if declared([s], k)), "")) is not None}
    assert kinds == {s.name for s in SCALARS}  # nothing is declared that no run logs


def test_the_stock_log_beside_our_scalars_is_read_by_stock_tools(tmp_path):
    train(digits_config(tmp_path, epochs=2, custom_hooks=[dict(type="GBRHook", num_samples=8, batch_size=8)]))
    (log,) = tmp_path.glob("*/vis_data/2*.json")
    found = load_json_log(log)["val"]  # all lines without a learning rate
    assert [line["step"] for line in found] == [1, 2]
    assert all("accuracy/top1" in line for line in found)
    assert {"enc/layers", "gbr/logits"} <= {key for line in scalars(tmp_path) for key in line}


def test_the_documentation_lists_every_declared_scalar():
    table = [line for line in (ROOT / "docs" / "measure.md").read_text().splitlines() if line.startswith("| `")]
    names = [part for line in table for part in re.findall(r"`([^`]+)`", line.split("|")[1])]
    whole = [name for name in names if not name.startswith("/")]
    ends = [name for name in names if name.startswith("/")]
    written = {*whole, *(whole_name.rsplit("/", 1)[0] + end for whole_name in whole for end in ends)}
    written |= {f"{name}{end}" for name in written for end in ends}
    for scalar in SCALARS:
        if "<layer>" not in scalar.name and "_seconds" not in scalar.name:
            assert any(scalar.words(name) is not None for name in written), scalar.name


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("gbr/probs", ("GBR: probs", "gbr/probs_sem", ("gbr/probs_low", "gbr/probs_high"))),
        ("enc_monitor/angle/median", ("Rotation of W", "", ("enc_monitor/angle/min", "enc_monitor/angle/max"))),
        ("enc_monitor/backbone.conv1/angle", ("Rotation of W in one step: backbone.conv1", "", None)),
    ],
)
def test_words_of_a_name_fill_the_texts_and_the_names_beside_it(key, expected):
    scalar = declared(SCALARS, key)
    assert scalar.title.startswith(expected[0])
    assert (scalar.error, scalar.band) == expected[1:]


def test_a_word_does_not_reach_over_a_slash_and_the_first_declaration_counts():
    scalars = [Scalar("a/<x>_sem", "error"), Scalar("a/<x>", "value of <x>")]
    assert declared(scalars, "a/b_sem").title == "error"
    assert declared(scalars, "a/b").title == "value of b"
    assert declared(scalars, "a/b/c") is None
    assert declared(scalars, "other") is None
