"""ENC layers against the stock layer that is given the literal effective weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from functional.test_weights import ALL, literal
from hypothesis import given
from hypothesis import strategies as st
from mmcv.cnn import ConvModule, build_conv_layer
from mmengine.registry import MODELS
from torch import nn
from torch.nn.utils import prune

from enc_plugin import ENCConv1d, ENCConv2d, ENCConv3d, ENCLinear
from enc_plugin.layers import ENC_LAYERS

CONVS = {1: ENCConv1d, 2: ENCConv2d, 3: ENCConv3d}


@given(
    dims=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    variant=st.sampled_from(ALL),
    alpha=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_convolution_is_the_stock_one_with_the_effective_weight(
    dims, groups, stride, dilation, bias, padding_mode, variant, alpha
):
    kwargs = dict(stride=stride, padding=1, dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode)
    if padding_mode == "reflect" and dims == 3:
        kwargs["padding_mode"] = "zeros"
    cls = CONVS[dims]
    layer = cls(8, 12, 3, **kwargs, dtype=torch.float64, variant=variant, alpha=alpha)
    stock = cls.plain_class(8, 12, 3, **kwargs, dtype=torch.float64)
    assert layer.state_dict().keys() - stock.state_dict().keys() == {"_extra_state"}
    stock.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        stock.weight.copy_(literal(stock.weight, variant, alpha))
    x = torch.randn(2, 8, *([7] * dims), dtype=torch.float64)
    torch.testing.assert_close(layer(x), stock(x))


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4)])
def test_linear_is_the_stock_one_with_the_effective_weight(variant, leading):
    layer = ENCLinear(6, 4, dtype=torch.float64, variant=variant)
    x = torch.randn(*leading, 6, dtype=torch.float64)
    expected = nn.functional.linear(x, literal(layer.weight, variant), layer.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("dims", "cls"), CONVS.items())
def test_post_norm_of_a_convolution_is_a_batch_norm_behind_it(dims, cls):
    layer = cls(4, 6, 3, post_norm=True)
    plain = cls(4, 6, 3)
    plain.load_state_dict(layer.state_dict(), strict=False)
    norm = layer.norm_class(6)
    x = torch.randn(4, 4, *([8] * dims))
    torch.testing.assert_close(layer(x), norm(plain(x)))
    torch.testing.assert_close(layer.norm.running_mean, norm.running_mean)
    # Without batch dimension, a 1-D output of shape (6, 6) could be taken for a batch of 6 samples.
    torch.testing.assert_close(layer.eval()(x[0]), layer(x)[0])
    assert set(layer.state_dict()) - set(plain.state_dict()) == {f"norm.{key}" for key in norm.state_dict()}


def test_post_norm_of_a_linear_layer_spans_all_leading_dimensions():
    layer = ENCLinear(6, 4, bias=False, post_norm=True)
    x = torch.randn(2, 3, 5, 6)
    out = layer(x)
    assert out.shape == (2, 3, 5, 4)
    torch.testing.assert_close(out.flatten(0, -2).mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer(x.flatten(0, -2)).view_as(out), out)


def test_learnable_alpha_is_a_positive_scalar_that_learns():
    layer = ENCConv2d(3, 4, 3, alpha="learnable")
    assert set(layer.state_dict()) == {"weight", "bias", "log_alpha", "_extra_state"}
    assert layer.alpha.item() == 1.0
    x = torch.randn(1, 3, 5, 5)
    optimizer = torch.optim.SGD([layer.log_alpha], lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert layer.alpha.item() > 0
    assert layer.alpha.item() != 1.0
    assert layer.effective_weight.square().sum().item() == pytest.approx(layer.alpha.item(), rel=1e-5)
    layer.reset_parameters()  # for a new start, as between the folds of a cross-validation
    assert layer.alpha.item() == 1.0


def test_stock_checkpoint_loads_strictly_into_a_layer_with_post_norm_and_learnable_alpha():
    layer = ENCLinear(3, 2, post_norm=True, alpha="learnable")
    stock = nn.Linear(3, 2)
    layer.load_state_dict(stock.state_dict())
    assert torch.equal(layer.weight, stock.weight)
    assert layer.alpha.item() == 1.0


def test_a_damaged_post_norm_checkpoint_is_still_an_error():
    layer = ENCLinear(3, 2, post_norm=True)
    state = layer.state_dict()
    del state["norm.running_mean"]
    with pytest.raises(RuntimeError, match=r"norm\.running_mean"):
        ENCLinear(3, 2, post_norm=True).load_state_dict(state)


@pytest.mark.parametrize("cls", ENC_LAYERS.values())
def test_layers_are_copied_and_pickled_whole(cls):
    args = (4, 6) if cls is ENCLinear else (4, 6, 3)
    layer = cls(*args, post_norm=True, alpha="learnable", variant="wn").eval()
    dims = {cls: dims for dims, cls in CONVS.items()}.get(cls, 0)
    x = torch.randn(2, 4, *([5] * dims))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.weight is not layer.weight


@pytest.mark.parametrize("change", [lambda layer: None, lambda layer: prune.l1_unstructured(layer, "weight", 0.3)])
def test_a_replica_of_data_parallel_computes_as_the_layer(change):
    layer = ENCLinear(30, 4, alpha="learnable", dtype=torch.float64)
    change(layer)
    replica = layer._replicate_for_data_parallel()
    for key, parameter in layer._parameters.items():  # as torch.nn.parallel.replicate does, which needs GPUs
        setattr(replica, key, 1 * parameter)
    x = torch.randn(3, 30, dtype=torch.float64)
    torch.testing.assert_close(replica(x), layer(x))


@pytest.mark.parametrize("cls", ENC_LAYERS.values())
def test_layers_are_in_the_registry_under_their_class_names(cls):
    assert MODELS.get(cls.__name__) is cls


@pytest.mark.parametrize(("dims", "cls"), CONVS.items())
def test_conv_cfg_builds_the_layer_with_its_options(dims, cls):
    cfg = dict(type=cls.__name__, variant="wn", alpha=2.0)
    layer = build_conv_layer(cfg, 4, 8, kernel_size=3, groups=2, bias=False)
    assert type(layer) is cls
    assert (layer.variant, layer.alpha, layer.groups) == ("wn", 2.0, 2)


def test_conv_module_runs_the_layer_before_its_norm():
    module = ConvModule(3, 8, 3, conv_cfg=dict(type="ENCConv2d"), norm_cfg=dict(type="BN"), act_cfg=None)
    assert type(module.conv) is ENCConv2d
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(module(x), nn.BatchNorm2d(8)(module.conv(x)))


def test_half_precision_layer_keeps_float32_statistics():
    layer = ENCConv2d(3, 8, 3, post_norm=True, alpha="learnable", dtype=torch.bfloat16)
    assert layer.norm.weight.dtype == torch.float32
    assert layer.log_alpha.dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(variant="eq22"), "variant: expected one of"),
        (dict(alpha=0), "alpha: expected a positive finite number or 'learnable', got 0"),
        (dict(alpha=-2.0), "alpha: expected a positive"),
        (dict(alpha="learn"), "alpha: expected a positive finite number or 'learnable', got 'learn'"),
    ],
)
def test_bad_options_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ENCConv2d(3, 4, 3, **kwargs)


def test_rows_of_one_element_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 1, 1, 1\) has rows of one element.*variant='fro'"):
        ENCConv2d(4, 4, 1, groups=4)
    with pytest.raises(ValueError, match="signs, which cannot be trained"):
        ENCConv2d(4, 4, 1, groups=4, variant="wn")
    ENCConv2d(4, 4, 1, groups=4, variant="fro")


def test_repr_shows_variant_and_alpha():
    assert "variant='ws', alpha=1" in repr(ENCConv2d(3, 4, 3))
    assert "alpha='learnable'" in repr(ENCLinear(3, 4, alpha="learnable"))
