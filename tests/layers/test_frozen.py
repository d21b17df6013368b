"""Post-norms and alphas of frozen layers, and of networks that are built on the meta device."""

from __future__ import annotations

import copy
import warnings

import mmpretrain.models  # noqa: F401  (registers the backbones)
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.registry import MODELS
from torch import nn

from enc_plugin import ENCLinear, to_enc
from enc_plugin.surgery.conversion_report import FrozenWarning


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


pytestmark = pytest.mark.filterwarnings("ignore:to_enc.* frozen")


def train(model, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_features_behind_a_frozen_layer_stay(when):
    model = network()
    if when == "before":
        model[0].requires_grad_(False)
    to_enc(model, alpha="learnable", post_norm=True)
    if when == "after":
        model[0].requires_grad_(False)
    assert not any(p.requires_grad for p in model[0].parameters())
    state = copy.deepcopy(model[0].state_dict())
    train(model)
    assert not model[0].norm.training
    assert model[2].norm.training
    assert all(torch.equal(state[key], value) for key, value in model[0].state_dict().items())


def test_outputs_of_frozen_layers_that_change_are_warned_of_and_not_when_they_are_kept_or_follow():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.BatchNorm1d(3))
    model[0].requires_grad_(False)
    copies = [copy.deepcopy(model) for _ in range(3)]
    with pytest.warns(FrozenWarning, match="1 of 2 ENC layers are frozen: 0. .*preserve=True, or .* exclude"):
        assert to_enc(model).frozen == ["0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_enc(model)  # a second time
        to_enc(copies[0], exclude="0")
        to_enc(copies[1], how="project")  # add_projection refuses it
        to_enc(copies[2].eval(), "wn", preserve=True)
        classifier(**SE_RESNET)  # loading weights warns


@pytest.mark.parametrize("unfreeze", [lambda x: x.requires_grad_(True), lambda x: x.weight.requires_grad_(True)])
def test_what_unfreezes_the_layer_unfreezes_its_norm(unfreeze):
    model = network()
    model[0].requires_grad_(False)
    to_enc(model)
    unfreeze(model[0])
    model.train()
    assert model[0].norm.training
    assert all(p.requires_grad for p in model[0].norm.parameters())


def test_a_norm_that_was_frozen_on_purpose_stays_frozen_and_one_that_alone_is_trained_works():
    model = network()
    to_enc(model)
    model[0].norm.requires_grad_(False)
    model.train()
    assert not any(p.requires_grad for p in model[0].norm.parameters())
    model[2].weight.requires_grad_(False)  # training nothing but batch norms
    model.train()
    assert model[2].norm.training


def test_a_layer_in_eval_mode_gets_a_norm_in_eval_mode():
    model = network()
    model[0].eval()
    to_enc(model)
    assert (model[0].norm.training, model[2].norm.training) == (False, True)


def classifier(backbone, channels, **options):
    return MODELS.build(
        dict(
            type="ENCImageClassifier",
            backbone=dict(type=f"mmpretrain.{backbone}", **options),
            neck=dict(type="mmpretrain.GlobalAveragePooling") if "ResNet" in backbone else None,
            head=dict(type="mmpretrain.LinearClsHead", num_classes=4, in_channels=channels),
        )
    )


SE_RESNET = dict(backbone="SEResNet", channels=256, depth=50, stem_channels=8, base_channels=8, frozen_stages=1)


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        (SE_RESNET, "layer1"),
        (
            dict(
                backbone="VisionTransformer",
                channels=32,
                arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64),
                img_size=32,
                patch_size=8,
                frozen_stages=2,
            ),
            "layers",
        ),
    ],
)
def test_frozen_stages_of_mmpretrain_hold_nothing_that_trains(options, frozen):
    model = classifier(**options)
    stage = getattr(model.backbone, frozen)
    assert any(".norm." in name for name, _ in stage.named_parameters())
    for _ in range(2):
        assert not any(p.requires_grad for p in stage.parameters())
        before = copy.deepcopy(stage.state_dict())
        model.train()
        model(torch.randn(2, 3, 32, 32), mode="tensor").square().sum().backward()
        norms = [m for m in stage.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert not any(norm.training for norm in norms)
        assert all(torch.equal(before[key], value) for key, value in stage.state_dict().items())


def _train_under_ddp(rank, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(classifier(**SE_RESNET))
    for _ in range(3):
        model.train()
        model(torch.randn(2, 3, 32, 32), mode="tensor").square().mean().backward()
    if rank == 0:
        queue.put("trained")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_network_with_a_frozen_stage_trains_under_ddp(tmp_path):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_train_under_ddp, args=(str(tmp_path / "store"), queue), nprocs=2)
    assert queue.get() == "trained"


def on_meta(alpha):
    with torch.device("meta"):
        model = network()
    to_enc(model, alpha=alpha)
    return model


@pytest.mark.parametrize("alpha", [1.0, "learnable"])
@pytest.mark.parametrize("load", ["to_empty", "to_empty of each module", "assign", "not at all"])
def test_a_network_from_the_meta_device_is_the_one_that_is_built_on_the_cpu(alpha, load):
    plain, expected, x = network().state_dict(), network(), torch.randn(4, 5)
    to_enc(expected, alpha=alpha)
    model = on_meta(alpha)
    if load == "to_empty of each module":
        for module in model.modules():
            module.to_empty(device="cpu", recurse=False)
            if hasattr(module, "reset_parameters"):  # as torch's FSDP does
                module.reset_parameters()
    elif load != "assign":
        model.to_empty(device="cpu")
    if load == "not at all":
        for layer in (model[0], model[2]):
            layer.reset_parameters()
        expected = copy.deepcopy(expected)
        expected.load_state_dict(model.state_dict())
    else:
        model.load_state_dict(plain, strict=True, assign=load == "assign")
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    for (name, a), b in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b), name
    torch.testing.assert_close(model.eval()(x), expected.eval()(x), rtol=0, atol=0)


def test_moving_a_trained_layer_does_not_reset_its_norm():
    layer = ENCLinear(4, 3, post_norm=True)
    layer(torch.randn(8, 4))
    before = layer.norm.running_var.clone()
    assert not torch.equal(before, torch.ones(3))
    assert torch.equal(layer.double().float().to("cpu").norm.running_var, before)
