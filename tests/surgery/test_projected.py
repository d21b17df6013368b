"""Networks whose constraint is left to the optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import build_runner, digits_config, train
from mmengine.hooks import Hook
from torch import nn
from torch.nn.utils import prune

from enc_plugin import audit, fold, param_groups_enc, to_enc
from enc_plugin.functional import enc_weight
from enc_plugin.layers import ENCLinear
from enc_plugin.projection import add_projection
from enc_plugin.surgery.projected import constrained_layers


def network():
    return nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))


IMAGES = torch.randn(8, 1, 8, 8)


def test_layers_stay_stock_but_for_the_batch_norm_that_is_due():
    model, plain = network(), network()
    plain.load_state_dict(model.state_dict())
    report = to_enc(model, how="project")
    assert [(x.name, x.post_norm) for x in report.layers] == [("0", False), ("4", True)]
    assert type(model[0]) is nn.Conv2d
    assert type(model[4]) is ENCLinear
    assert set(model.state_dict()) - set(plain.state_dict()) == {
        "4._extra_state",
        *(f"4.norm.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
    assert torch.equal(model[0].weight, plain[0].weight)
    # The layer with the norm computes with its weight as it is.
    expected = model[4].norm(plain[4](plain[3](plain[2](plain[1](plain[0](IMAGES))))))
    torch.testing.assert_close(model(IMAGES), expected)


def step(model, mode="retract", **options):
    groups = param_groups_enc(model, weight_decay=1e-2, projection=mode, **options)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    add_projection(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("mode", ["retract", "rotate"])
def test_parameter_groups_hold_the_marked_weights_and_decay_the_others_as_ever(mode):
    model = network()
    to_enc(model, how="project", exclude="4")
    optimizer = step(model, mode)
    assert audit(model).max_deviation < 1e-6
    assert [row.type for row in audit(model)] == ["Conv2d"]
    torch.testing.assert_close(model[0].weight, enc_weight(model[0].weight), rtol=1e-6, atol=1e-7)
    held = [group for group in optimizer.param_groups if "enc_projection" in group]
    assert [len(group["params"]) for group in held] == [1]
    assert held[0]["params"][0] is model[0].weight
    assert all("shift_eps" not in group for group in optimizer.param_groups)
    assert not torch.equal(model[4].weight, enc_weight(model[4].weight))


def test_folding_merges_the_batch_norm_and_leaves_a_stock_network():
    model = network()
    to_enc(model, how="project")
    step(model)
    model.eval()
    plain = fold(model)
    assert [type(m) for m in plain] == [type(m) for m in network()]
    assert not list(constrained_layers(plain))
    assert set(plain.state_dict()) == set(network().state_dict())
    torch.testing.assert_close(plain(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_copies_and_a_second_conversion_keep_the_marks():
    model = network()
    to_enc(model, how="project")
    model = copy.deepcopy(model)
    to_enc(model, how="project")
    assert [name for name, _ in constrained_layers(model)] == ["0", "4"]
    with pytest.raises(ValueError, match="'0' is already ENC with variant='ws', alpha=1.0, how='project', but"):
        to_enc(model)
    with pytest.raises(ValueError, match="'0' is already ENC with variant='ws'"):
        to_enc(model, "wn", how="project")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(how="optimizer"), "how: expected 'reparametrize' or 'project', got 'optimizer'"),
        (dict(how="project", alpha="learnable"), "a learnable alpha needs how='reparametrize'"),
        (dict(how="project", preserve=True), "preserve: needs how='reparametrize'"),
    ],
)
def test_what_a_projection_cannot_do_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        to_enc(network(), **options)


def test_a_weight_that_is_pruned_after_conversion_is_refused_by_the_parameter_groups():
    model = network()
    to_enc(model, how="project")
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="layer '0': its weight is pruned or parametrized"):
        param_groups_enc(model)


def test_a_weight_that_is_pruned_after_the_optimizer_was_made_is_projected_as_a_whole_and_the_audit_shows_it():
    model = network()
    to_enc(model, how="project", exclude="4")
    optimizer = step(model)
    prune.l1_unstructured(model[0], "weight", 0.5)
    model(IMAGES).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight_orig, enc_weight(model[0].weight_orig), rtol=1e-6, atol=1e-7)
    model(IMAGES)  # the pruned weight is computed again
    missing = 1 - model[0].weight.square().sum().item()
    assert missing > 0.01
    assert audit(model).max_deviation == pytest.approx(missing, rel=1e-3)


def test_a_pruned_layer_with_a_post_norm_computes_without_the_pruned_elements():
    model = nn.Sequential(nn.Linear(12, 4))
    to_enc(model, how="project")
    layer, x = prune.l1_unstructured(model.eval()[0], "weight", 0.5), torch.randn(3, 12)
    expected = layer.norm(nn.functional.linear(x, layer.weight_orig * layer.weight_mask, layer.bias))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(fold(model)(x), expected)


def test_a_weight_that_is_pruned_during_a_run_stops_it_at_the_next_epoch(tmp_path):
    cfg = digits_config(
        tmp_path, "resnet8_1xb64", epochs=2, model__type="ENCImageClassifier", model__enc=dict(how="project")
    )
    runner = build_runner(cfg)
    hook = Hook()
    hook.after_train_epoch = lambda runner: prune.l1_unstructured(runner.model.backbone.conv1, "weight", 0.5)
    runner.register_hook(hook)
    with pytest.raises(ValueError, match="layer 'backbone.conv1': its weight is pruned or parametrized"):
        runner.train()
    assert runner.epoch == 1


def test_a_projection_without_a_marked_layer_is_refused():
    with pytest.raises(ValueError, match="projection: the model has no projected layers"):
        param_groups_enc(network(), projection="retract")


def test_a_run_holds_weights_and_averages_on_the_set(tmp_path):
    cfg = digits_config(
        tmp_path,
        "resnet8_1xb64",
        model__type="ENCImageClassifier",
        model__enc=dict(how="project"),
        optim_wrapper__paramwise_cfg=dict(projection="rotate"),
        custom_hooks=[dict(type="EMAHook", momentum=0.1)],
    )
    runner = train(cfg)
    for model in (runner.model, next(h for h in runner.hooks if type(h).__name__ == "EMAHook").ema_model.module):
        layers = dict(constrained_layers(model))
        assert len(layers) == len(audit(model)) == 10
        assert audit(model).max_deviation < 1e-6
        for layer in layers.values():
            torch.testing.assert_close(layer.weight, enc_weight(layer.weight), rtol=1e-5, atol=1e-7)


def test_a_run_whose_optimizer_would_not_project_is_refused_before_training(tmp_path):
    cfg = digits_config(tmp_path, "resnet8_1xb64", model__type="ENCImageClassifier", model__enc=dict(how="project"))
    cfg.optim_wrapper.constructor = "DefaultOptimWrapperConstructor"
    runner = build_runner(cfg)
    with pytest.raises(ValueError, match="no optimizer projects 10 of its layers .'backbone.conv1', .*constructor="):
        runner.train()
    assert runner.iter == 0
