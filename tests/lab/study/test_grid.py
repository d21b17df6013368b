"""The declared grid: what it refuses, the order of its runs, and that its cells differ in what they say alone."""

from __future__ import annotations

import pytest
import torch
from helpers import ROOT
from mmengine.runner import set_random_seed
from mmpretrain.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from enc_plugin.convert import enc_layers
from enc_plugin.engine import ENCOptimWrapperConstructor
from lab.study import CELLS, load_grid

GRID = CELLS

SMALL = """
arenas = dict(a=dict(title="A", config="lab/study/digits_resnet8.py", images=10, epochs=1, overrides={}))
cells = dict(a={"x": dict(title="X", seeds=[0, 1]), "y": dict(title="Y", seeds=[5])})
"""


def write(tmp_path, text):
    path = tmp_path / "grid.py"
    path.write_text(text)
    return path


def test_first_seeds_of_all_cells_run_before_second_ones(tmp_path):
    runs = load_grid(write(tmp_path, SMALL)).runs()
    assert [run.id for run in runs] == ["a/x-seed0", "a/y-seed5", "a/x-seed1"]


def test_patterns_choose_arenas_and_cells():
    grid = load_grid(GRID)
    assert {run.cell.arena.name for run in grid.runs(["digits"])} == {"digits"}
    assert {run.cell.name for run in grid.runs(["quarter/enc-a*"])} == {"enc-a0.5", "enc-a2", "enc-alearn"}
    with pytest.raises(ValueError, match="only: 'nowhere/\\*' matches no cell"):
        grid.runs(["nowhere/*"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds=[5]", "seeds=[5, 5]", "cell 'a/y' needs different seeds"),
        ("seeds=[5]", "seeds=[]", "at least one, got \\[\\]"),
        ("seeds=[5]", "sedes=[5]", "cell 'a/y' sets sedes"),
        ('title="Y", ', "", "cell 'a/y' lacks title"),
        ("images=10, ", "", "arena 'a' lacks images"),
        ("images=10, ", "images=10, repeats='b', ", "arena 'a' refers to b, which is no arena"),
        ("cells = dict(a=", "cells = dict(b=", "for the arena 'b'; the arenas are a"),
        ('"y"', '"y/z"', "holds a '/'"),
    ],
)
def test_a_faulty_grid_names_the_place(tmp_path, old, new, message):
    assert old in SMALL
    with pytest.raises(ValueError, match=message):
        load_grid(write(tmp_path, SMALL.replace(old, new)))


def test_a_missing_grid_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_grid(tmp_path / "none.py")


def initial_model(run):
    set_random_seed(run.seed)
    model = MODELS.build(run.config(ROOT).model)
    model.init_weights()
    return model


def first_runs():
    return [run for run in load_grid(GRID).runs() if run.seed == 0]


def test_all_cells_of_a_seed_start_from_the_same_weights_and_random_state():
    baselines = {}
    for run in first_runs():
        if run.cell.arena.name in ("full", "g0", "g1", "g2", "g3"):  # of parts that other arenas have
            continue
        model = initial_model(run)
        state, arena = (model.state_dict(), torch.get_rng_state()), run.cell.arena.name
        want, want_random = baselines.setdefault(arena, state)
        shared = set(want) & set(state[0])
        assert len(shared) == len(want), run.id
        for key in shared:
            assert torch.equal(want[key], state[0][key]), (run.id, key)
        assert torch.equal(want_random, state[1]), run.id


def describe(run):
    """What distinguishes a cell: ENC variants, alphas, batch norms, shifts."""
    model = initial_model(run)
    cfg = run.config(ROOT)
    wrapper = ENCOptimWrapperConstructor(
        {"optimizer": dict(cfg.optim_wrapper.optimizer)}, cfg.optim_wrapper.get("paramwise_cfg")
    )(model)
    held = [g for g in wrapper.param_groups if "enc_projection" in g]
    return {
        "variants": {(layer.variant, layer.settings["alpha"]) for _, layer in enc_layers(model)},
        "enc": len(list(enc_layers(model))),
        "norms": sum(isinstance(module, _BatchNorm) for module in model.modules()),
        "shifted": sum(len(g["params"]) for g in wrapper.param_groups if "shift_eps" in g),
        "convs": {type(m).__name__ for m in model.modules() if isinstance(m, nn.Conv2d)},
        "decay": max(g["weight_decay"] for g in wrapper.param_groups),
        "held": {(g["enc_projection"], g["enc_variant"], len(g["params"])) for g in held},
    }


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("overfit/enc-retract", {"norms": 22, "shifted": 0, "convs": {"Conv2d"}, "held": {("retract", "ws", 22)}}),
        ("overfit/enc-rotate", {"norms": 22, "shifted": 0, "convs": {"Conv2d"}, "held": {("rotate", "ws", 22)}}),
        ("overfit/enc-ws", {"enc": 22, "norms": 22, "shifted": 22, "convs": {"ENCConv2d"}, "held": set()}),
        ("g2/ws-bn-cutmix-ls", {"norms": 22, "convs": {"ConvWS2d"}, "decay": 2e-3}),
        ("g3/baseline", {"enc": 0, "norms": 20, "convs": {"Conv2d"}, "decay": 4e-3}),
        ("g4/enc-wd1e-2", {"enc": 22, "norms": 22, "decay": 1e-2}),
        ("baseline", {"enc": 0, "norms": 21, "shifted": 0, "convs": {"Conv2d"}, "decay": 1e-4}),
        ("bn", {"enc": 0, "norms": 22, "shifted": 0}),
        ("bn-shift", {"enc": 0, "norms": 22, "shifted": 22}),
        ("enc-ws", {"enc": 22, "norms": 22, "shifted": 22, "variants": {("ws", 1.0)}}),
        ("enc-ws-nobn", {"enc": 22, "norms": 21, "shifted": 22, "variants": {("ws", 1.0)}}),
        ("enc-ws-noshift", {"enc": 22, "norms": 22, "shifted": 0, "variants": {("ws", 1.0)}}),
        ("ws", {"enc": 0, "norms": 21, "shifted": 0, "convs": {"ConvWS2d"}}),
        ("ws-bn", {"enc": 0, "norms": 22, "shifted": 0, "convs": {"ConvWS2d"}}),
        ("wn", {"enc": 0, "norms": 21, "shifted": 0, "convs": {"WNConv2d"}}),
        ("enc-wn", {"enc": 22, "variants": {("wn", 1.0)}}),
        ("enc-fro", {"enc": 22, "variants": {("fro", 1.0)}}),
        ("enc-cfro", {"enc": 22, "variants": {("centered_fro", 1.0)}}),
        ("enc-alearn", {"enc": 22, "variants": {("ws", "learnable")}}),
        ("wd1e-2", {"enc": 0, "norms": 21, "decay": 1e-2}),
    ],
)
def test_a_cell_is_what_its_title_says(cell, expected):
    name = cell if "/" in cell else f"quarter/{cell}"
    run = next(run for run in first_runs() if run.id == f"{name}-seed0")
    found = describe(run)
    assert {key: found[key] for key in expected} == expected
