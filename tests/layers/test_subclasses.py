"""Subclasses of the stock layers: converted if they use their weight as it is, left plain with a reason if not."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Generic, TypeVar

import mmcv.cnn.bricks.wrappers as wrappers
import mmpretrain
import pytest
import timm
import torch
import torchvision
from functional.test_weights import ALL, literal
from mmcv.cnn.bricks import Conv2dAdaptivePadding, ConvAWS2d, ConvWS2d
from mmengine.model import kaiming_init
from mmengine.model.weight_init import KaimingInit
from mmpretrain.models.heads.margin_head import NormProduct
from mmpretrain.models.utils.sparse_modules import SparseConv2d
from torch import nn
from torch.ao.nn import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations

from enc_plugin import NoEffectWarning, fold, to_enc
from enc_plugin.layers import ENCLayer, enc_class

CONVERTED = {
    "mmcv Conv2d": (lambda: wrappers.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "mmcv Conv3d": (lambda: wrappers.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "mmcv Linear": (lambda: wrappers.Linear(4, 6), (2, 4)),
    "mmcv adaptive padding": (lambda: Conv2dAdaptivePadding(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "timm Conv2dSame": (lambda: timm.layers.Conv2dSame(4, 6, 3, stride=2, groups=2), (2, 4, 7, 7)),
    "timm Linear": (lambda: timm.layers.Linear(4, 6, bias=False), (2, 5, 4)),
    "torchvision Conv3DNoTemporal": (
        lambda: torchvision.models.video.resnet.Conv3DNoTemporal(4, 6),
        (2, 4, 3, 5, 5),
    ),
}


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("name", CONVERTED)
def test_a_subclass_computes_its_own_forward_with_the_effective_weight(name, variant):
    make, shape = CONVERTED[name]
    model = nn.Sequential(make().double())
    plain = copy.deepcopy(model)
    stock, x = type(model[0]), torch.randn(shape, dtype=torch.float64)
    report = to_enc(model, variant, alpha=2.0, post_norm=False)
    assert (len(report), report.skipped) == (1, {})
    assert isinstance(model[0], (ENCLayer, stock))
    with torch.no_grad():
        plain[0].weight.copy_(literal(plain[0].weight, variant, 2.0))
    torch.testing.assert_close(model(x), plain(x))
    model(x).square().sum().backward()
    assert model[0].weight.grad.any()

    folded = fold(model)
    assert type(folded[0]) is stock
    torch.testing.assert_close(folded(x), plain(x))
    plain.load_state_dict(folded.state_dict(), strict=True)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_subclass_is_copied_pickled_and_given_a_post_norm(name):
    make, shape = CONVERTED[name]
    layer = make()
    to_enc(layer, post_norm=True)
    layer.norm.running_mean.normal_()
    layer.eval()
    x = torch.randn(shape)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(fold(layer)(x), layer(x), rtol=1e-4, atol=1e-5)
    assert "variant='ws'" in repr(layer)


T = TypeVar("T")


class Locked(nn.Conv2d, Generic[T]):
    """Has a type parameter, and an attribute that pickle does not take."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_a_generic_subclass_with_a_state_of_its_own_is_converted_copied_pickled_and_folded():
    layer, x = Locked(4, 6, 3), torch.randn(2, 4, 5, 5)
    assert len(to_enc(layer, post_norm=False)) == 1
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fold(layer)):
        torch.testing.assert_close(other(x), layer(x))
        assert not other.lock.locked()


def test_each_subclass_has_one_enc_class_and_mmengine_still_initialises_it():
    assert enc_class(Conv2dAdaptivePadding) is enc_class(Conv2dAdaptivePadding)
    assert issubclass(enc_class(Conv2dAdaptivePadding), Conv2dAdaptivePadding)
    model = nn.Sequential(Conv2dAdaptivePadding(4, 6, 3))
    to_enc(model)
    before = model[0].weight.clone()
    KaimingInit(layer=["Conv2d"])(model)
    assert not torch.equal(model[0].weight, before)
    kaiming_init(model[0])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: timm.layers.StdConv2d(4, 6, 3), "StdConv2d transforms its weight itself"),
        (lambda: timm.layers.ScaledStdConv2d(4, 6, 3), "ScaledStdConv2d transforms its weight itself"),
        (lambda: timm.layers.ScaledStdConv2dSame(4, 6, 3), "ScaledStdConv2dSame transforms its weight itself"),
        (lambda: ConvWS2d(4, 6, 3), "ConvWS2d transforms its weight itself"),
        (lambda: ConvAWS2d(4, 6, 3), "ConvAWS2d transforms its weight itself"),
        (lambda: NormProduct(4, 6), "NormProduct transforms its weight itself"),
        (lambda: SparseConv2d(4, 6, 3), "SparseConv2d does not run outside of the network"),
        (lambda: qat.Conv2d(4, 6, 3, qconfig=get_default_qat_qconfig("fbgemm")), "Conv2d quantises its weight"),
        (lambda: nn.LazyConv2d(6, 3), "LazyConv2d has no weight before its first forward pass"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), "computed from other parameters"),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 6)), "computed from other parameters"),
    ],
)
def test_a_layer_that_makes_its_own_weight_stays_plain_with_the_reason(make, reason):
    model = nn.Sequential(make())
    before = type(model[0])
    with pytest.warns(NoEffectWarning):
        report = to_enc(model)
    assert type(model[0]) is before
    assert reason in report.skipped["0"]


def test_what_torch_computes_without_calling_the_layer_stays_plain():
    # Attention hands its projection to one function; the encoder layer has a fast path that takes all weights.
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8))
    report = to_enc(model)
    assert [layer.name for layer in report.layers] == ["1"]
    for name in ("0.self_attn.out_proj", "0.linear1", "0.linear2"):
        assert report.skipped[name] == "TransformerEncoderLayer reads its weight without calling it"
    assert "parameter of MultiheadAttention" in report.skipped["0.self_attn.in_proj_weight"]
    # There is no fast path for sequences that come first; attention reads its projection all the same.
    report = to_enc(nn.TransformerEncoderLayer(8, 2, 16))
    assert [layer.name for layer in report.layers] == ["linear1", "linear2"]
    assert report.skipped["self_attn.out_proj"] == "MultiheadAttention reads its weight without calling it"


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (timm.models.beit.Attention(16, 2, qkv_bias=True), 1),
        (timm.models.beit.Attention(16, 2, qkv_bias=False), 0),
        (mmpretrain.models.utils.BEiTAttention(16, window_size=(2, 2), use_rel_pos_bias=True, num_heads=2), 1),
        (timm.models.vision_transformer.Attention(16, 2), 0),
    ],
)
def test_a_weight_that_the_parent_reads_itself_stays_plain(model, count):
    report = to_enc(model)
    assert list(report.skipped.values()).count(f"{type(model).__name__} reads its weight without calling it") == count
    assert ("qkv" in report.skipped) == (count == 1)
    assert "proj" in [layer.name for layer in report.layers]


def test_exclude_may_name_a_layer_that_stays_plain_anyway():
    model = nn.Sequential(timm.layers.StdConv2d(4, 6, 3), nn.Conv2d(6, 6, 1))
    assert [layer.name for layer in to_enc(model, exclude="0").layers] == ["1"]


def test_trying_a_layer_out_leaves_it_and_the_random_state_alone():
    model = nn.Sequential(ConvAWS2d(4, 6, 3), wrappers.Conv2d(4, 6, 3))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    to_enc(model)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_pattern_on_a_layer_that_must_stay_plain_is_an_error():
    with pytest.raises(ValueError, match="include: '0' matches no layer"):
        to_enc(nn.Sequential(timm.layers.StdConv2d(4, 6, 3), nn.Conv2d(6, 6, 1)), include="0")


def test_meta_layers_are_tried_out_too():
    with torch.device("meta"):
        model = nn.Sequential(timm.layers.StdConv2d(4, 6, 3), timm.layers.Conv2dSame(4, 6, 3))
    report = to_enc(model)
    assert list(report.skipped) == ["0"]
