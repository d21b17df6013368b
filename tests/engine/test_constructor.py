"""Parameter groups by table, and optimizer steps against the closed form."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from functional.test_decay import literal as shifted
from functional.test_weights import ALL
from helpers import CONFIGS
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import OPTIMIZERS
from mmpretrain.registry import MODELS
from torch import nn

from enc_plugin import ENCConv2d, ENCLinear, to_enc
from enc_plugin.build import config_file
from enc_plugin.engine import ENCOptimWrapperConstructor

SGD = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4)


def build(model: nn.Module, optimizer: dict = SGD, paramwise_cfg: dict | None = None, **wrapper):
    return ENCOptimWrapperConstructor(dict(optimizer=optimizer, **wrapper), paramwise_cfg)(model)


def group_of(wrapper, param: nn.Parameter) -> dict:
    (group,) = [g for g in wrapper.optimizer.param_groups if any(p is param for p in g["params"])]
    return group


def net(variant: str = "ws", dtype=torch.float64) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3)).to(dtype)
    to_enc(model, variant)
    return model


@pytest.fixture
def warnings():
    """Texts of the warnings in mmengine's log."""
    found, logger = [], MMLogger.get_current_instance()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_parameter_groups_of_resnet50():
    model = MODELS.build(Config.fromfile(CONFIGS / "resnet50_enc_8xb32.py").model)
    groups = build(model).optimizer.param_groups
    table = [(len(g["params"]), g["lr"], g["weight_decay"], g.get("enc_variant"), g.get("shift_eps")) for g in groups]
    assert table == [
        (54, 0.1, 1e-4, "ws", 1e-3),  # 53 convolutions and the classifier
        (54, 0.1, 1e-4, None, None),  # batch norm weights, the classifier's own among them
        (55, 0.1, 0.0, None, None),  # biases of 54 batch norms and of the classifier
    ]


def test_parameter_groups_of_the_plain_baseline():
    model = MODELS.build(Config.fromfile(CONFIGS / "resnet50_8xb32.py").model)
    groups = build(model).optimizer.param_groups
    assert [(len(g["params"]), g["weight_decay"], "shift_eps" in g) for g in groups] == [
        (53 + 53 + 1, 1e-4, False),
        (53 + 1, 0.0, False),
    ]


def test_learnable_alpha_and_every_kind_of_bias_do_not_decay():
    model = nn.ModuleDict(
        {
            "conv": ENCConv2d(3, 4, 3, alpha="learnable"),
            "fc": ENCLinear(4, 4, post_norm=True),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "recurrent": nn.LSTM(4, 2),
            "norm": nn.LayerNorm(4),
        }
    )
    wrapper = build(model)
    decays = {name: group_of(wrapper, p)["weight_decay"] for name, p in model.named_parameters()}
    assert {name for name, decay in decays.items() if decay == 0} == {
        "conv.bias",
        "conv.log_alpha",
        "fc.bias",
        "fc.norm.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "attention.bias_k",
        "attention.bias_v",
        "recurrent.bias_ih_l0",
        "recurrent.bias_hh_l0",
        "norm.bias",
    }


def test_paramwise_options_are_honoured():
    model = net()
    wrapper = build(
        model,
        paramwise_cfg=dict(
            lr_mult=2.0,
            decay_mult=0.5,
            bias_lr_mult=3.0,
            norm_decay_mult=0.0,
            shift_eps=1e-6,
            custom_keys={"3": dict(lr_mult=0.1), "3.weight": dict(decay_mult=4.0, shift_eps=0.5)},
        ),
    )
    conv, norm, fc = model[0], model[1], model[3]
    assert group_of(wrapper, conv.weight)["lr"] == pytest.approx(0.2)
    assert group_of(wrapper, conv.weight)["weight_decay"] == pytest.approx(5e-5)
    assert group_of(wrapper, conv.weight)["shift_eps"] == 1e-6
    assert group_of(wrapper, conv.bias)["lr"] == pytest.approx(0.6)
    assert group_of(wrapper, norm.weight)["weight_decay"] == 0.0
    assert group_of(wrapper, fc.weight)["weight_decay"] == pytest.approx(4e-4)
    assert group_of(wrapper, fc.weight)["shift_eps"] == 0.5
    assert group_of(wrapper, fc.weight)["lr"] == pytest.approx(0.2)  # the longest key decides
    assert group_of(wrapper, fc.bias)["weight_decay"] == 0.0
    assert group_of(wrapper, fc.bias)["lr"] == pytest.approx(0.06)


def test_a_shared_parameter_is_in_one_group():
    shared = nn.Linear(3, 3)
    groups = build(nn.ModuleList([shared, nn.Sequential(shared)])).optimizer.param_groups
    assert sum(len(g["params"]) for g in groups) == 2


def test_decay_that_the_config_leaves_out_is_the_optimizers_default_and_spares_biases():
    model = net()
    wrapper = build(model, dict(type="AdamW", lr=1e-3))
    assert group_of(wrapper, model[0].weight)["weight_decay"] == 0.01
    assert group_of(wrapper, model[0].bias)["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("paramwise_cfg", "message"),
    [
        (dict(custom_keys={"backbone": dict(lr_mult=0.1)}), "custom_keys: 'backbone' matches no parameter.*'0.weight'"),
        (dict(bias_decay=0.0), "paramwise_cfg: unknown option 'bias_decay'; expected any of custom_keys"),
        (dict(layer_decay_rate=0.65), "drop one that the config inherits for another constructor with .*_delete_=True"),
        (dict(shift_eps=-1.0), "shift_eps: expected a finite number >= 0"),
        (dict(custom_keys={"0": dict(shift_eps=float("nan"))}), "eps: expected a finite number"),
    ],
)
def test_bad_options_are_named(paramwise_cfg, message):
    with pytest.raises(ValueError, match=message):
        build(net(), paramwise_cfg=paramwise_cfg)


def test_the_misspelt_option_of_stock_twins_configs_is_ignored_as_by_mmengine():
    cfg = Config.fromfile(config_file("mmpretrain::twins/twins-svt-base_8xb128_in1k.py")).optim_wrapper
    assert "_delete" in cfg.paramwise_cfg
    model = net().append(nn.LayerNorm(3))
    assert group_of(build(model, cfg.optimizer, cfg.paramwise_cfg), model[-1].weight)["weight_decay"] == 0


def test_exemptions_from_decay_that_stock_configs_inherit_in_vain_are_warned_of(warnings):
    """ConvMixer's config inherits the schedule of Swin transformers, as those of ConvNeXt, VAN and others do."""
    cfg = Config.fromfile(config_file("mmpretrain::convmixer/convmixer-768-32_10xb64_in1k.py"))
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert sorted(keys) == [".absolute_pos_embed", ".relative_position_bias_table"]
    model = net()
    wrapper = build(model, cfg.optim_wrapper.optimizer, cfg.optim_wrapper.paramwise_cfg)
    assert group_of(wrapper, model[0].weight)["weight_decay"] == 0.05
    assert group_of(wrapper, model[1].weight)["weight_decay"] == 0.0
    (text,) = warnings
    assert "no parameter is exempted from decay by '.absolute_pos_embed', '.relative_position_bias_table'" in text
    assert sorted(keys) == [".absolute_pos_embed", ".relative_position_bias_table"]  # the run's config stays as it is
    keys["3.weight"] = dict(decay_mult=0.0)
    assert group_of(build(model, SGD, dict(custom_keys=keys)), model[3].weight)["weight_decay"] == 0.0


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_sgd_steps_equal_the_closed_form(variant, eps):
    model = net(variant)
    wrapper = build(model, SGD | dict(weight_decay=0.1), dict(shift_eps=eps))
    weight, bias, gamma = model[0].weight, model[0].bias, model[1].weight
    buffers = {p: torch.zeros_like(p) for p in (weight, bias, gamma)}
    for step in range(3):
        expected = {}
        grads = {p: torch.randn_like(p) for p in model.parameters()}
        for p, grad in grads.items():
            p.grad = grad.clone()
        for p in buffers:
            decay = shifted(p.detach(), variant, eps) if p is weight else p.detach() if p is gamma else 0.0
            total = grads[p] + 0.1 * decay
            buffers[p] = total if step == 0 else 0.9 * buffers[p] + total
            expected[p] = p.detach() - 0.1 * buffers[p]
        wrapper.step()
        for p, value in expected.items():
            torch.testing.assert_close(p.detach(), value)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_adamw_steps_equal_the_closed_form(variant, eps):
    model = net(variant)
    lr, decay, beta1, beta2, tiny = 0.05, 0.3, 0.9, 0.999, 1e-8
    wrapper = build(model, dict(type="AdamW", lr=lr, weight_decay=decay), dict(shift_eps=eps))
    weight = model[0].weight
    first = second = torch.zeros_like(weight)
    for step in range(1, 4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        grad, before = weight.grad.clone(), weight.detach().clone()
        first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad**2
        update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + tiny)
        expected = before - lr * decay * shifted(before, variant, eps) - lr * update
        wrapper.step()
        torch.testing.assert_close(weight.detach(), expected)


def test_adam_with_coupled_decay_takes_the_shift_through_the_gradient():
    model, twin = net("wn"), net("wn")
    twin.load_state_dict(model.state_dict())
    wrapper = build(model, dict(type="Adam", lr=0.1, weight_decay=0.3), dict(shift_eps=0.5))
    plain = torch.optim.Adam(twin.parameters(), lr=0.1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    twin[0].weight.grad += 0.3 * shifted(twin[0].weight.detach(), "wn", 0.5)
    wrapper.step()
    plain.step()
    torch.testing.assert_close(model[0].weight, twin[0].weight)


@pytest.mark.parametrize("decoupled", [None, True, False])
def test_paramwise_cfg_says_how_an_optimizer_decays_that_no_trial_can_tell(decoupled):
    @OPTIMIZERS.register_module(force=True)
    class Untried(torch.optim.SGD):
        """Neither its constructor's signature nor a copy lets the trial run it."""

        def __init__(self, params, lr, weight_decay, key="secret"):
            super().__init__(params, lr=lr, weight_decay=weight_decay)
            self.key = {"secret": 1}[key]

        def step(self, closure=None):
            if self.param_groups[0]["params"][0].shape == (4, 4, 1, 1):
                raise RuntimeError("no trials")
            return super().step(closure)

    model = net("wn")
    wrapper = build(
        model, dict(type="Untried", lr=0.1, weight_decay=0.1), dict(shift_eps=0.5, decoupled_decay=decoupled)
    )
    before = model[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    wrapper.step()
    assert group_of(wrapper, model[0].weight).get("enc_decoupled") is decoupled
    torch.testing.assert_close(model[0].weight.detach(), before - 0.01 * shifted(before, "wn", 0.5))  # both ways


def test_the_shift_enters_after_clipping_and_once_for_accumulated_gradients():
    model = net("fro")
    wrapper = build(
        model,
        dict(type="SGD", lr=1.0, weight_decay=0.1),
        dict(shift_eps=0.5),
        type="OptimWrapper",
        clip_grad=dict(max_norm=1e-3),
        accumulative_counts=3,
    )
    wrapper.initialize_count_status(model, 0, 3)
    weight = model[0].weight
    before = weight.detach().clone()
    for _ in range(3):
        with wrapper.optim_context(model):
            wrapper.update_params(model(torch.randn(4, 2, 3, 3, dtype=torch.float64)).square().sum())
    moved = weight.detach() - before + 0.1 * shifted(before, "fro", 0.5)
    assert moved.norm() <= 1e-3
    assert moved.norm() > 0


def test_frozen_weights_and_weights_without_gradient_are_left_alone():
    model = net()
    model[0].weight.requires_grad_(False)
    wrapper = build(model, SGD | dict(weight_decay=0.5), dict(shift_eps=1.0))
    before = [p.detach().clone() for p in model.parameters()]
    wrapper.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("then", "now"), [(0.5, 0.25), (0.5, 0.0), (0.0, 0.25), (0.5, 0.5)])
def test_a_resumed_run_takes_the_shift_of_its_config_and_says_so(then, now, warnings):
    model = net("wn")
    state = build(model, paramwise_cfg=dict(shift_eps=then)).state_dict()
    again = build(model, paramwise_cfg=dict(shift_eps=now))
    again.load_state_dict(state)
    group = group_of(again, model[0].weight)
    assert (group["enc_variant"], group.get("shift_eps", 0.0)) == ("wn", now)
    assert len(warnings) == (then != now)
    assert all(str(eps or "no shift") in text for eps in (then, now) for text in warnings)


def test_a_resumed_run_says_that_it_goes_on_with_the_decay_of_the_checkpoint(warnings):
    model = net("wn")
    state = build(model, SGD | dict(weight_decay=0.5)).state_dict()
    again = build(model, SGD | dict(weight_decay=0.25))
    again.load_state_dict(state)
    assert group_of(again, model[0].weight)["weight_decay"] == 0.5
    assert ["weight_decay: the checkpoint has 0.5, the config 0.25" in text for text in warnings] == [True]


def test_a_checkpoint_of_other_groups_is_refused_with_the_way_out():
    state = build(net("wn"), paramwise_cfg=dict(custom_keys={"3.weight": dict(shift_eps=0.5)})).state_dict()
    with pytest.raises(ValueError, match=r"paramwise_cfg: .*groups of 1, 4, 2, 1 parameters.*of 2, 4, 2; .*load_from"):
        build(net("wn")).load_state_dict(state)


def test_shift_settles_where_the_gradient_of_a_scale_free_weight_cannot_hold_it():
    """Decay alone drives a scale-free weight to 0; with the shift its row norms settle at eps."""
    torch.manual_seed(0)
    for eps, low, high in ((0.2, 0.19, 0.21), (0.0, 0.0, 0.05)):
        layer = ENCLinear(5, 3, bias=False, variant="wn", dtype=torch.float64)
        wrapper = build(layer, dict(type="SGD", lr=0.5, weight_decay=0.1), dict(shift_eps=eps))
        for _ in range(300):
            layer.weight.grad = torch.zeros_like(layer.weight)
            wrapper.step()
        assert low <= layer.weight.norm(dim=1).min().item() <= layer.weight.norm(dim=1).max().item() <= high, eps
        assert math.isfinite(layer.weight.sum().item())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_moves_nothing(fused):
    model = net(dtype=torch.float32)
    wrapper = build(model, dict(type="AdamW", lr=0.1, weight_decay=0.1, fused=fused), dict(shift_eps=1.0))
    before = model[0].weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(4, 2, 3, 3)).sum() * float("inf")).backward()
    scaler.step(wrapper.optimizer)
    assert torch.equal(model[0].weight, before)


def test_custom_settings_may_be_lists():
    model = net()
    wrapper = build(model, dict(type="Adam", lr=0.1), dict(custom_keys={"3.weight": dict(betas=[0.5, 0.9])}))
    assert group_of(wrapper, model[3].weight)["betas"] == [0.5, 0.9]
