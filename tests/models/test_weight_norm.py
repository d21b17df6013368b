"""The WN layer against torch's own weight_norm."""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer, fuse_conv_bn
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from enc_plugin.models import WNConv2d


def wn_pair(**options) -> tuple[WNConv2d, nn.Module]:
    """A WN layer and torch's parametrized convolution with the same direction, gain and bias."""
    layer = WNConv2d(6, 8, 3, padding=1, **options)
    layer.gain.data.uniform_(0.5, 2)
    plain = nn.Conv2d(6, 8, 3, padding=1, **options)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "gain"})
    reference = weight_norm(plain)
    reference.parametrizations.weight.original0.data.copy_(layer.gain)
    return layer, reference


@pytest.mark.parametrize("options", [{}, {"bias": False, "groups": 2}])
def test_wn_layer_and_its_gradients_equal_torch_weight_norm(options):
    layer, reference = wn_pair(**options)
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(layer(x), reference(x))
    layer(x).square().mean().backward()
    reference(x).square().mean().backward()
    torch.testing.assert_close(layer.gain.grad, reference.parametrizations.weight.original0.grad)
    torch.testing.assert_close(layer.weight.grad, reference.parametrizations.weight.original1.grad)


def test_wn_layer_keeps_stock_keys_and_starts_with_unit_rows():
    layer = WNConv2d(6, 8, 3)
    assert list(layer.state_dict()) == ["weight", "bias", "gain"]
    torch.testing.assert_close(layer.effective_weight.flatten(1).norm(dim=1), torch.ones(8))


def test_wn_layer_computes_what_a_stock_checkpoint_computed():
    stock = nn.Conv2d(6, 8, 3)
    layer = WNConv2d(6, 8, 3)
    layer.load_state_dict(stock.state_dict())
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(layer(x), stock(x))


def test_wn_layer_loads_its_own_checkpoint_gain_included():
    layer = WNConv2d(6, 8, 3)
    layer.gain.data.uniform_(0.5, 2)
    other = WNConv2d(6, 8, 3)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.gain, layer.gain)


def test_fusing_a_batch_norm_into_a_wn_layer_is_refused():
    model = nn.Sequential(WNConv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    model[1].running_var.uniform_(0.5, 2)
    with pytest.raises(ValueError, match=r"weight: .*rescaled rows.*torch.nn.Conv2d with the weight effective_weight"):
        fuse_conv_bn(model)


@pytest.mark.skipif(not hasattr(ConvModule, "turn_on_efficient_conv_bn_eval"), reason="mmcv 2.0.0 does not merge them")
def test_a_wn_layer_refuses_a_batch_norm_that_mmcv_merges_in_each_pass():
    merging = ConvModule(6, 8, 3, conv_cfg=dict(type="WNConv2d"), norm_cfg=dict(type="BN")).eval()
    merging.turn_on_efficient_conv_bn_eval()
    with pytest.raises(ValueError, match="turn efficient_conv_bn_eval off"):
        merging(torch.randn(2, 6, 5, 5))


def test_other_weights_may_be_assigned_and_rescaled_ones_loaded():
    layer = WNConv2d(6, 8, 3)
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    state = {key: value * 2 for key, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer.weight, state["weight"])
    assert torch.equal(layer.gain, state["gain"])


def test_wn_layer_survives_deepcopy():
    layer, _ = wn_pair()
    x = torch.randn(1, 6, 5, 5)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


def test_conv_cfg_builds_the_wn_layer():
    assert type(build_conv_layer(dict(type="WNConv2d"), 3, 8, 3)) is WNConv2d
