"""fold() and fuse(): the plain network with the same outputs, in stock classes and under stock keys."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from functional.test_weights import ALL, literal
from hypothesis import given
from hypothesis import strategies as st
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmengine.hub import get_config
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.feature_extraction import create_feature_extractor

from enc_plugin import (
    ENCConv1d,
    ENCConv2d,
    ENCConv3d,
    ENCLinear,
    NoEffectWarning,
    fold,
    to_enc,
)
from enc_plugin.convert import enc_layers
from enc_plugin.layers import ENCLayer

CONVS = {1: ENCConv1d, 2: ENCConv2d, 3: ENCConv3d}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def randomize_norms(model: nn.Module) -> None:
    """Statistics and gains that no batch norm starts with."""
    for norm in model.modules():
        if isinstance(norm, BATCH_NORMS):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)


def train(model: nn.Module, size: int = 32, steps: int = 2) -> nn.Module:
    """A few real steps of SGD on noise, so that statistics and weights have moved; then eval mode."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        logits = outputs(model, torch.randn(4, 3, size, size))
        F.cross_entropy(logits, torch.arange(4) % logits.shape[1]).backward()
        optimizer.step()
    return model.eval()


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return out[0] if isinstance(out, tuple) else out


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@given(
    dims=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    post_norm=st.booleans(),
    alpha=st.sampled_from([0.5, 1.0, "learnable"]),
    variant=st.sampled_from(ALL),
)
def test_a_folded_convolution_is_the_literal_equation_and_its_batch_norm(dims, groups, bias, post_norm, alpha, variant):
    layer = CONVS[dims](
        8, 12, 3, groups=groups, bias=bias, variant=variant, alpha=alpha, post_norm=post_norm, dtype=torch.float64
    ).eval()
    with torch.no_grad():
        randomize_norms(layer)
        if alpha == "learnable":
            layer.log_alpha.fill_(0.7)
    x = torch.randn(2, 8, *[5] * dims, dtype=torch.float64)
    value = layer.log_alpha.exp().item() if alpha == "learnable" else alpha
    conv = getattr(F, f"conv{dims}d")
    expected = conv(x, literal(layer.weight.detach(), variant, value), layer.bias, groups=groups)
    if post_norm:
        norm = layer.norm
        expected = F.batch_norm(expected, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    folded = fold(layer)

    assert type(folded) is layer.plain_class
    assert set(folded.state_dict()) == ({"weight", "bias"} if bias or post_norm else {"weight"})
    torch.testing.assert_close(folded(x), expected, rtol=1e-10, atol=1e-10)


@given(bias=st.booleans(), post_norm=st.booleans(), variant=st.sampled_from(ALL), tokens=st.booleans())
def test_a_folded_linear_layer_is_the_literal_equation_and_its_batch_norm(bias, post_norm, variant, tokens):
    layer = ENCLinear(7, 5, bias=bias, variant=variant, post_norm=post_norm, dtype=torch.float64).eval()
    randomize_norms(layer)
    x = torch.randn(4, 3, 7, dtype=torch.float64) if tokens else torch.randn(4, 7, dtype=torch.float64)
    expected = F.linear(x, literal(layer.weight.detach(), variant, 1.0), layer.bias).reshape(-1, 5)
    if post_norm:
        norm = layer.norm
        expected = F.batch_norm(expected, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    torch.testing.assert_close(fold(layer)(x).reshape(-1, 5), expected, rtol=1e-10, atol=1e-10)


def of_mmpretrain(config: str) -> nn.Module:
    cfg = get_config(f"mmpretrain::{config}").model
    cfg.head.num_classes = 10
    cfg.head.topk = (1,)
    return MODELS.build(cfg)


@pytest.mark.parametrize(
    ("make", "variant"),
    [
        (lambda: timm.create_model("resnet18", num_classes=10), "fro"),
        (lambda: of_mmpretrain("resnet/resnet50_8xb32_in1k.py"), "wn"),
        (lambda: of_mmpretrain("seresnet/seresnet50_8xb32_in1k.py"), "ws"),
        (lambda: of_mmpretrain("densenet/densenet121_4xb256_in1k.py"), "centered_fro"),
    ],
    ids=["timm resnet18", "resnet50", "seresnet50", "densenet121"],
)
def test_real_networks_fold_into_stock_ones_after_training_steps(make, variant):
    torch.manual_seed(0)
    model = make()
    stock = copy.deepcopy(model).double().eval()
    to_enc(model, variant)
    train(model).double()  # a network after two steps multiplies the rounding of float32 by up to a thousand
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    folded = fold(model)
    assert not any(isinstance(module, ENCLayer) for module in folded.modules())
    stock.load_state_dict(folded.state_dict(), strict=True)
    with torch.no_grad():
        expected = outputs(model, x)
        assert relative_error(outputs(folded, x), expected) < 1e-10
        assert relative_error(outputs(stock, x), expected) < 1e-10


def test_fold_leaves_the_enc_network_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4, 5))
    to_enc(model)
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    folded = fold(model)
    for parameter in folded.parameters():
        nn.init.zeros_(parameter)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def _keeping(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass that keeps the outputs of its last forward pass, with their graph, in a list and a dict."""

    class Keeps(base):
        def forward(self, x):
            self.kept, self.by_name = [super().forward(x)], {"maps": (x,)}
            return self.kept[0]

    return Keeps


def test_networks_that_keep_features_of_a_forward_pass_are_converted_and_folded():
    layers = [nn.Conv2d(3, 8, 3), _keeping(nn.Conv2d)(8, 8, 3), _keeping(nn.BatchNorm2d)(8)]
    model = _keeping(nn.Sequential)(*layers)
    x = torch.rand(2, 3, 8, 8)
    model(x)
    assert len(to_enc(model)) == 2
    expected = model.eval()(x)
    assert relative_error(fold(model)(x), expected) < 1e-5
    assert relative_error(model[1].fuse()(model[0](x)), model[1](model[0](x))) < 1e-5
    assert model.kept[0].requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_fold_keeps_mode_hooks_and_frozen_parameters(training):
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    to_enc(model)
    model.train(training)
    model[0].weight.requires_grad_(False)
    model[0].register_forward_hook(_double)
    folded = fold(model)
    x = torch.randn(1, 3, 5, 5)
    assert folded[0].training is training
    assert not folded[0].weight.requires_grad
    assert folded[0].bias.requires_grad
    assert torch.equal(folded(x), model(x))


def _double(module, args, out):
    return 2 * out


def test_fold_keeps_the_mode_of_feature_extractors_which_their_copies_forget():
    model = create_feature_extractor(torchvision.models.resnet18(num_classes=4), ["layer2"])
    to_enc(model)
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    folded = fold(model)
    assert relative_error(folded(x)["layer2"], model(x)["layer2"]) < 1e-5
    assert all(module.training for module in fold(model.train()).modules())


def test_fold_of_a_network_with_a_frozen_script_which_has_no_mode():
    script = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).eval()))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    to_enc(model)
    model.append(script)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(fold(model)(x), model(x))


def test_a_layer_in_two_places_stays_one_and_a_tied_weight_is_normalised_once():
    shared = nn.Conv2d(4, 4, 1)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    to_enc(twice)
    folded = fold(twice)
    assert folded[0] is folded[2]
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(folded(x), twice(x))

    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    to_enc(tied, "ws", include="0", post_norm=False)
    to_enc(tied, "fro", include="1", post_norm=False)
    x = torch.randn(3, 4)
    torch.testing.assert_close(fold(tied)(x), tied(x))


def test_an_enc_classifier_folds_to_the_stock_class():
    cfg = get_config("mmpretrain::resnet/resnet18_8xb16_cifar10.py").model
    model = MODELS.build({**cfg, "type": "ENCImageClassifier", "enc": {"variant": "wn"}}).eval()
    folded = fold(model)
    assert type(folded) is ImageClassifier
    assert type(folded.head.fc) is nn.Linear
    assert not [name for name in vars(folded) if "enc" in name]
    folded.load_state_dict(MODELS.build(cfg).state_dict(), strict=True)


def test_torchvision_squeeze_excitation_folds_into_itself():
    model = torchvision.models.mobilenet_v3_small(num_classes=5)
    stock = copy.deepcopy(model).eval()
    to_enc(model, "wn")
    randomize_norms(model)
    model.eval()
    stock.load_state_dict(fold(model).state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(stock(x), model(x)) < 1e-5


def test_half_precision_folds_in_its_own_dtype():
    layer = ENCConv2d(4, 8, 3, post_norm=True).eval()
    randomize_norms(layer)
    x = torch.randn(1, 4, 5, 5)
    expected = layer(x)
    folded = fold(layer.to(torch.bfloat16))
    assert folded.weight.dtype == folded.bias.dtype == torch.bfloat16
    assert relative_error(folded(x.bfloat16()).float(), expected) < 0.05


@pytest.mark.parametrize("how", ["reparametrize", "project"])
def test_a_folded_weight_keeps_its_memory_format(how):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4))
    to_enc(network.to(memory_format=torch.channels_last), how=how)
    folded = fold(network.eval())
    assert [p.stride() for p in folded.parameters()] == [p.stride() for p in network.parameters()]
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_plain_network_is_a_warning_and_a_copy():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.warns(NoEffectWarning, match="Sequential has no ENC layer"):
        copied = fold(model)
    assert copied is not model


def test_a_layer_without_a_direction_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    to_enc(model)
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ValueError, match="layer '0': 8 of its 8 rows are all zero"):
        fold(model)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3, track_running_stats=False), nn.GroupNorm(1, 3), nn.Identity()])
def test_a_post_norm_without_running_statistics_is_refused(norm):
    layer = ENCLinear(4, 3, post_norm=True)
    layer.norm = norm
    with pytest.raises(ValueError, match=f"got a {type(norm).__name__} without running statistics"):
        fold(layer)


def test_timm_reparameterize_model_folds_and_leaves_the_network_alone():
    model = timm.create_model("seresnet50", num_classes=10, layers=(1, 1, 1, 1))
    to_enc(model)
    train(model)
    x = torch.randn(2, 3, 32, 32)
    plain = reparameterize_model(model)
    assert len(list(enc_layers(plain))) == 0
    assert len(list(enc_layers(model))) > 0
    with torch.no_grad():
        assert relative_error(plain(x), model(x)) < 1e-5


# Whoever fuses a batch norm into an ENC layer reads W and writes a weight that would be normalised again.
@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("bias", [True, False])
def test_fuse_conv_bn_on_an_enc_network_names_fold(variant, bias):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8)).eval()
    to_enc(model, variant)
    if variant == "fro":
        model[0].weight.data[0] = 0  # as after pruning
    with pytest.raises(ValueError, match=r"enc_plugin\.fold\(model\) first"):
        fuse_conv_bn(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"enc_plugin\.fold\(model\) first"):
        fuse_conv_bn_eval(model[0], model[1])


@pytest.mark.skipif(not hasattr(ConvModule, "turn_on_efficient_conv_bn_eval"), reason="mmcv 2.0.0 does not merge them")
def test_batch_norms_that_mmcv_merges_in_each_pass_need_the_folded_network():
    model = nn.Sequential(ConvModule(3, 8, 3, norm_cfg=dict(type="BN")))
    to_enc(model)
    randomize_norms(model)
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    folded = fold(model)
    for network in (model, folded):
        network[0].turn_on_efficient_conv_bn_eval()
    with pytest.raises(ValueError, match=r"turn efficient_conv_bn_eval off. Call enc_plugin.fold\(model\) first"):
        model(x)
    assert relative_error(folded(x), expected) < 1e-5
    subclass = timm.layers.Conv2dSame(3, 8, 3)
    to_enc(subclass, post_norm=False)
    with pytest.raises(ValueError, match="a weight made from the free weight of this ENCConv2dSame"):
        subclass._conv_forward(x, 2 * subclass.weight, None)


def test_fuse_conv_bn_after_fold_is_right():
    model = timm.create_model("resnet18", num_classes=10)
    to_enc(model)
    train(model)
    x = torch.randn(2, 3, 32, 32)
    fused = fuse_conv_bn(fold(model))
    assert isinstance(fused.bn1, nn.Identity)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-5


def test_other_ways_to_set_a_weight_stay_open():
    layer = ENCConv2d(3, 8, 3)
    layer.weight = nn.Parameter(torch.randn(8, 3, 3, 3))  # other values
    layer.weight = nn.Parameter(layer.weight.detach().clone())  # the same
    layer.weight = nn.Parameter(layer.weight.detach().half())  # another precision
    layer.float().weight.data.mul_(3)
    rescaled = {key: 2 * value for key, value in layer.state_dict().items()}
    layer.load_state_dict(rescaled, assign=True)
    assert torch.equal(layer.weight, rescaled["weight"])


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_blocks_that_merge_their_kernels_ask_for_fold_and_work_after_it(name):
    model = timm.create_model(name, num_classes=10)
    to_enc(model, "fro")  # the others cannot train depthwise 1x1 kernels
    randomize_norms(model)
    model.eval()
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"reparameterize merges .* enc_plugin\.fold\(model\) first"):
        reparameterize_model(model)
    with torch.no_grad():
        merged = reparameterize_model(fold(model))
        assert relative_error(merged(x), model(x)) < 1e-4
