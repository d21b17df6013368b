"""to_enc(preserve=True): a trained network keeps its function, or says what changes."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import pytest
import timm
import torch
from functional.test_weights import ALL
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS
from surgery.test_fold import outputs, randomize_norms, relative_error
from torch import nn

from enc_plugin import CheckpointWarning, ENCConv2d, fold, to_enc

NORM_ONLY = ("fro", "wn")


def trained(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and gains of a network that has been trained."""
    torch.manual_seed(0)
    randomize_norms(model)
    return model.eval()


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def densenet() -> nn.Module:
    cfg = dict(type="DenseNet", arch="121", drop_rate=0.1, num_classes=5)
    backbone = {key: value for key, value in cfg.items() if key != "num_classes"}
    return MODELS.build(
        dict(
            type="ImageClassifier",
            backbone=backbone,
            neck=dict(type="GlobalAveragePooling"),
            head=dict(type="LinearClsHead", num_classes=5, in_channels=1024),
        )
    )


@pytest.mark.parametrize(
    ("make", "variant"),
    [
        (lambda: timm.create_model("seresnet50", num_classes=5, layers=(1, 1, 1, 1)), "fro"),
        # Kernels reach their batch norms through concatenation and pooling, many each.
        (densenet, "wn"),
        (lambda: timm.create_model("repvgg_a0", num_classes=5), "fro"),
        (lambda: timm.create_model("tf_efficientnet_b0", num_classes=5), "wn"),
    ],
    ids=["seresnet", "densenet121", "repvgg", "efficientnet"],
)
def test_norm_only_variants_keep_the_function_of_real_networks(make, variant):
    model = trained(make()).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = outputs(model, x)
        report = to_enc(model, variant, preserve=torch.randn(2, 3, 48, 48, dtype=torch.float64))
        assert relative_error(outputs(model, x), expected) < 1e-8
        assert relative_error(outputs(fold(model), x), expected) < 1e-8
    assert report.preserved.output_change < 1e-8
    assert not any(report.preserved.removed_mean.values())


@pytest.mark.parametrize("variant", NORM_ONLY)
@pytest.mark.parametrize("affine", [True, False])
def test_the_function_is_kept_in_train_mode_too_where_no_post_norm_is_added(variant, affine):
    # eps would swallow the small variances of norm-1 layers if the gain did not make up for it.
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=affine)).double()
    x = torch.randn(64, 3, 9, 9, dtype=torch.float64)
    model[1].momentum = None
    model(x)  # running statistics become the batch's
    expected = copy.deepcopy(model)(x)
    to_enc(model, variant, preserve=x)
    torch.testing.assert_close(model.eval()(x), copy.deepcopy(model).eval()(x))
    if affine:
        torch.testing.assert_close(model.train()(x), expected, rtol=1e-3, atol=1e-4)


def test_preserve_keeps_mode_random_state_and_makes_up_its_input():
    model = trained(small_net()).train()
    state = torch.get_rng_state()
    report = to_enc(model, "wn", preserve=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert report.preserved.output_change < 1e-5
    assert "the outputs change by" in str(report)


@pytest.mark.parametrize("variant", ["ws", "centered_fro"])
def test_centered_variants_say_how_much_the_means_were(variant):
    model = trained(small_net())
    with torch.no_grad():
        model[0].weight.add_(0.5)
    w = model[0].weight.detach().double().flatten(1)
    mean = w.mean(1, keepdim=True) if variant == "ws" else w.mean()
    share = (mean.square().expand_as(w).sum() / w.square().sum()).item()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    with pytest.warns(UserWarning, match="removes means, 'wn' and 'fro' do not"):
        report = to_enc(model, variant, preserve=x)
    assert report.preserved.removed_mean["0"] == pytest.approx(share, rel=1e-6)
    assert report.preserved.output_change == pytest.approx(relative_error(model(x), expected), rel=1e-5)


@pytest.mark.parametrize("variant", ALL)
def test_a_network_without_means_keeps_its_function_under_every_variant(variant):
    model = trained(small_net())
    with torch.no_grad():
        for layer in (model[0], model[5]):
            layer.weight -= layer.weight.flatten(1).mean(1).view(-1, *[1] * (layer.weight.ndim - 1))
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    to_enc(model, variant, preserve=x)
    assert relative_error(model(x), expected) < 1e-5


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x) + x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.a(x)) + self.norm(self.b(x))


class Asks(nn.Sequential):
    def forward(self, x):
        x = self[0](x)
        return self[1](x) if x[0, 0, 0, 0].item() < 1e9 else x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Asks(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), r"'0' \(its output goes into '_local_scalar_dense'\)"),
        (Residual(), r"'conv' \(its output goes into 'add'\)"),
        (Twice(), r"'a' \(its batch norm is used in several places\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.BatchNorm2d(4)), r"'0' \(its output goes into 'hardtanh'\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), r"'0' \(its output goes into 'native_group_norm'\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"'0' \(it is an output of the network\)"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
            "has no running statistics",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2)), "does not run on a generated input"),
    ],
)
def test_a_scale_that_cannot_be_moved_is_an_error_and_the_model_unchanged(model, message):
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        to_enc(model, "wn", preserve=True)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_network_on_the_meta_device_has_no_function_to_keep():
    model = small_net().to("meta")
    with pytest.raises(ValueError, match="preserve: the weights are on the meta device"):
        to_enc(model, "wn", preserve=True)
    assert type(model[0]) is nn.Conv2d


@dataclass
class Result:
    logits: torch.Tensor


class TiedLayers(nn.Module):
    """Two layers with one weight and one bias, a counter of forward passes, and an object as output."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return Result(self.norms[1](self.b(self.norms[0](self.a(x)))))


def test_tied_biases_are_scaled_once_and_outputs_within_objects_are_compared():
    model, x = trained(TiedLayers()), torch.randn(2, 3, 5, 5)
    expected = copy.deepcopy(model)(x).logits
    to_enc(model, "wn", preserve=x)
    assert model.passes == 0
    assert relative_error(model(x).logits, expected) < 1e-5


def test_a_hook_that_changes_an_output_is_noticed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda layer, args, out: out + 1)
    with pytest.warns(UserWarning, match="could not keep the function .*a hook changes an output"):
        report = to_enc(model, "wn", preserve=True)
    assert report.preserved.output_change > 0.01


class Shuffled(nn.Module):
    """ShuffleNet's mixing of groups, padding of channels, a gain per channel, and an average over the pixels."""

    def __init__(self):
        super().__init__()
        self.conv, self.gain, self.norm = nn.Conv2d(3, 6, 3), nn.Parameter(torch.randn(6, 1, 1)), nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.conv(x) * self.gain
        x = x.view(len(x), 2, 3, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return self.norm(nn.functional.pad(x, (0, 0, 0, 0, 1, 1)).mean((2, 3)))


class Tokens(nn.Module):
    """A linear layer on tokens whose batch norm wants the features in front."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("variant", NORM_ONLY)
@pytest.mark.parametrize(
    "make",
    [
        Shuffled,
        Tokens,
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.PReLU(4), nn.MaxPool1d(2), nn.BatchNorm1d(4)),
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.BatchNorm1d(4)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(16)),
    ],
    ids=["shuffled", "tokens", "conv1d", "conv3d", "flattened"],
)
def test_a_scale_follows_its_channels_wherever_they_are_moved(make, variant):
    model = trained(make()).double()
    made_up = to_enc(copy.deepcopy(model), variant, post_norm=False, preserve=True)
    assert made_up.preserved.output_change < 1e-8


BACKBONE = dict(type="ResNetCIFAR6n", depth=8)
CLASSIFIER = dict(
    type="ImageClassifier",
    backbone=BACKBONE,
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=64),
)


def build(**options) -> nn.Module:
    return MODELS.build(Config({**CLASSIFIER, **options}).to_dict())


@pytest.fixture
def stock_checkpoint(tmp_path):
    stock = trained(build())
    torch.save({"state_dict": stock.state_dict()}, tmp_path / "stock.pth")
    return stock, str(tmp_path / "stock.pth")


@pytest.mark.filterwarnings("error::enc_plugin.CheckpointWarning")
def test_fine_tuning_with_enc_is_a_config_option(stock_checkpoint, caplog):
    stock, path = stock_checkpoint
    x = torch.randn(2, 3, 16, 16)
    model = build(type="ENCImageClassifier", enc=dict(variant="wn", preserve=True)).eval()
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        load_checkpoint(model, path)
    finally:
        logger.removeHandler(caplog.handler)
    assert re.search(r"ENC: loaded plain weights; preserve: the outputs change by \d\.\de-0[5-9] ", caplog.text)
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)

    # What was trained since then is ENC: loading it is no second conversion.
    again = build(type="ENCImageClassifier", enc=dict(variant="wn", preserve=True)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    assert torch.equal(fold(again).state_dict()["head.fc.weight"], fold(model).state_dict()["head.fc.weight"])


@pytest.mark.parametrize("part", ["whole", "backbone"])
def test_init_cfg_keeps_the_function_of_pretrained_weights(stock_checkpoint, part):
    stock, path = stock_checkpoint
    init_cfg = dict(type="Pretrained", checkpoint=path)
    options = dict(type="ENCImageClassifier", enc=dict(variant="fro", preserve=True))
    if part == "whole":
        model = build(**options, init_cfg=init_cfg)
    else:
        model = build(**options, backbone=BACKBONE | dict(init_cfg=init_cfg | dict(prefix="backbone.")))
    model.init_weights()
    model.eval()
    x = torch.randn(2, 3, 16, 16)
    expected = stock.extract_feat(x)[-1]
    torch.testing.assert_close(model.extract_feat(x)[-1], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def enc_checkpoint(tmp_path):
    """An ENC network with statistics of its own, and a file of its weights as a plain dict, without metadata."""
    model = trained(build(type="ENCImageClassifier", enc=dict(variant="wn")))
    torch.save({"state_dict": dict(model.state_dict())}, tmp_path / "enc.pth")
    return model, str(tmp_path / "enc.pth")


def test_preserve_leaves_enc_weights_alone_whichever_way_they_come(enc_checkpoint):
    source, path = enc_checkpoint
    options = dict(type="ENCImageClassifier", enc=dict(variant="wn", preserve=True))
    pretrained = dict(init_cfg=dict(type="Pretrained", checkpoint=path, prefix="backbone."))
    x = torch.randn(2, 3, 16, 16)
    model = build(**options, backbone=BACKBONE | pretrained)
    model.init_weights()
    assert torch.equal(model.eval().extract_feat(x)[-1], source.extract_feat(x)[-1])
    model = build(**options)
    load_checkpoint(model, path)
    assert torch.equal(model.eval()(x), source(x))
    to_enc(model, "wn", preserve=x)
    assert torch.equal(model(x), source(x))


def test_of_a_checkpoint_with_plain_and_enc_layers_preserve_keeps_the_function(tmp_path):
    source = trained(build(type="ENCImageClassifier", enc=dict(variant="wn", exclude="head")))
    model = build(type="ENCImageClassifier", enc=dict(variant="wn", preserve=True))
    model.load_state_dict(dict(source.state_dict()))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(x), source(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::enc_plugin.CheckpointWarning")
def test_preserve_does_not_guess_which_layers_were_enc(enc_checkpoint):
    source, _ = enc_checkpoint
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("_extra_state")}
    model = build(type="ENCImageClassifier", enc=dict(variant="wn", preserve=True))
    with pytest.raises(ValueError, match=r"layer 'head.fc' was ENC, but its entry '_extra_state'.* is missing"):
        model.load_state_dict(state)


def test_without_preserve_a_stock_checkpoint_loads_and_warns(stock_checkpoint):
    _, path = stock_checkpoint
    model = build(type="ENCImageClassifier")
    with pytest.warns(CheckpointWarning, match=r"of a plain network: .* enc=dict\(preserve=True\)"):
        load_checkpoint(model, path)


def test_layers_that_are_enc_from_the_start_keep_their_function_too():
    model = trained(nn.Sequential(ENCConv2d(3, 8, 3, variant="wn"), nn.BatchNorm2d(8)))
    plain = copy.deepcopy(model)
    plain[0].__class__ = nn.Conv2d
    x = torch.randn(2, 3, 9, 9)
    expected = plain(x)
    to_enc(model, "wn", preserve=x)
    assert relative_error(model(x), expected) < 1e-5
