"""E-folds of whole configs against the sum written out, and against the learning rates of a real run."""

from __future__ import annotations

import pytest
from helpers import ROOT
from mmengine.config import Config

from enc_plugin.engine.efolds import config_efolds, learning_rates


def test_the_papers_recipe_has_33_e_folds():
    cfg = Config.fromfile(ROOT / "configs" / "resnet50_enc_8xb32.py")
    lr_sum = 5004 * (30 * 0.1 + 30 * 0.01 + 30 * 0.001 + 10 * 0.0001)
    assert config_efolds(cfg, iterations=5004) == pytest.approx(2 * 1e-4 * lr_sum / 0.1)
    assert round(config_efolds(cfg, iterations=5004)) == 33


def test_schedulers_by_iteration_act_at_each_step():
    cfg = Config(
        dict(
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
            param_scheduler=[
                dict(type="LinearLR", start_factor=0.5, by_epoch=False, begin=0, end=4),
                dict(type="MultiStepLR", milestones=[2], gamma=0.1),
            ],
            train_cfg=dict(by_epoch=True, max_epochs=3),
        )
    )
    rates = list(learning_rates(cfg, iterations=4))
    assert len(rates) == 12
    assert rates[0] == pytest.approx(0.05)
    assert rates[4:8] == pytest.approx([0.1] * 4)
    assert rates[8:] == pytest.approx([0.01] * 4)


def test_momentum_plays_no_part_in_decoupled_decay_and_adam_has_no_e_folds():
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)), train_cfg=dict(max_epochs=1)))
    assert config_efolds(cfg, iterations=50) == pytest.approx(2 * 0.01 * 0.01 * 50)
    cfg.optim_wrapper.optimizer.type = "Adam"
    assert config_efolds(cfg, iterations=50) is None
