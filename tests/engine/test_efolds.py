"""E-folds of configs and of optimizers that step, against the sum written out and measured norms."""

from __future__ import annotations

import pytest
import torch
from helpers import ROOT
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS

from enc_plugin import ENCLinear
from enc_plugin.engine.efolds import DecayTally, config_efolds, scheduled_settings


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
    rates = [settings["lr"] for settings in scheduled_settings(cfg, iterations=4)]
    assert len(rates) == 12
    assert rates[0] == pytest.approx(0.05)
    assert rates[4:8] == pytest.approx([0.1] * 4)
    assert rates[8:] == pytest.approx([0.01] * 4)


DECAY = dict(type="CosineAnnealingParamScheduler", param_name="weight_decay", T_max=10, eta_min=1e-2)
MOMENTUM = dict(type="CosineAnnealingMomentum", T_max=10, eta_min=0.95)
WARM_UP = dict(type="LinearParamScheduler", param_name="weight_decay", start_factor=0.01, by_epoch=False, end=500)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "scaling"),
    [
        (dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-3), DECAY, None),
        (dict(type="SGD", lr=0.02, momentum=0.5, weight_decay=1e-3), MOMENTUM, None),
        (dict(type="AdamW", lr=1e-3, weight_decay=0.05), WARM_UP, None),
        (dict(type="SGD", lr=0.01, weight_decay=1e-2), dict(type="PolyLR", eta_min=0.005, end=10), 16),
    ],
)
def test_the_e_folds_of_a_config_are_those_of_its_scheduled_decay(optimizer, scheduler, scaling):
    """Oracle: mmengine's own classes decay a weight with zero gradient."""
    cfg = Config(
        dict(optim_wrapper=dict(optimizer=optimizer), param_scheduler=scheduler, train_cfg=dict(max_epochs=10))
    )
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    options = dict(optimizer)
    built = getattr(torch.optim, options.pop("type"))([weight], **options)
    if scaling is not None:
        cfg.train_dataloader, cfg.auto_scale_lr = dict(batch_size=64), dict(base_batch_size=scaling, enable=True)
        built.param_groups[0]["lr"] *= 64 / scaling
    schedule = PARAM_SCHEDULERS.build(dict(scheduler, _scope_="mmengine"), default_args=dict(optimizer=built))
    for step in range(1, 1001):
        weight.grad = torch.zeros_like(weight)
        built.step()
        if not schedule.by_epoch or step % 100 == 0:
            schedule.step()
    assert config_efolds(cfg, iterations=100) == pytest.approx(-2 * weight.log().item(), rel=0.05)


def test_momentum_plays_no_part_in_decoupled_decay_and_adam_has_no_e_folds():
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)), train_cfg=dict(max_epochs=1)))
    assert config_efolds(cfg, iterations=50) == pytest.approx(2 * 0.01 * 0.01 * 50)
    cfg.optim_wrapper.optimizer.type = "Adam"
    assert config_efolds(cfg, iterations=50) is None


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, dict(momentum=0.9)),
        (torch.optim.SGD, dict(momentum=0.5, dampening=0.5, foreach=True)),
        (torch.optim.AdamW, {}),
    ],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_the_tally_is_what_decay_takes_from_a_weight_with_zero_gradient(kind, settings, tensor_lr):
    layers = [ENCLinear(8, 4, bias=False, dtype=torch.float64) for _ in range(3)]
    start = [layer.weight.detach().clone() for layer in layers]
    groups = [
        dict(params=[layers[0].weight], weight_decay=0.002),
        dict(params=[layers[1].weight], weight_decay=0.0005),
        dict(params=[layers[2].weight], weight_decay=0.002),
    ]
    optimizer = kind(groups, lr=torch.tensor(0.05) if tensor_lr else 0.05, **settings)
    tally = DecayTally([optimizer])
    for layer in layers[:2]:
        layer.weight.grad = torch.zeros_like(layer.weight)  # the third has none: it does not decay
    for step in range(400):
        for group in optimizer.param_groups:
            # Up and down: what momentum carries into smaller steps, it carried into larger ones before.
            rate = 0.05 * (1 - abs(step / 200 - 1))
            group["lr"] = torch.tensor(rate) if tensor_lr else rate
        optimizer.step()
    ends = [layer.weight.detach() for layer in layers]
    lost = [2 * (a.norm() / b.norm()).log().item() for a, b in zip(start, ends, strict=True)]
    found = [tally.of(layer.weight) for layer in layers]
    assert found == pytest.approx(lost, rel=0.02)
    assert found[0] == pytest.approx(4 * found[1])
    assert (found[0] > 0.03, found[2]) == (True, 0.0)
    again = DecayTally([optimizer])
    assert again.load(tally.state())
    assert [again.of(layer.weight) for layer in layers] == found
    assert not DecayTally([]).load(tally.state())


def test_optimizers_without_a_rate_of_decay_and_foreign_weights_have_no_tally():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    tally = DecayTally([torch.optim.Adam([weight])])
    assert tally.of(weight) is None
