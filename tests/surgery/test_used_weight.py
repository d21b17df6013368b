"""What a layer computes with, against its literal Jacobian by autograd in float64."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from mmcv.cnn.bricks import Conv2dAdaptivePadding, ConvAWS2d, ConvWS2d
from mmpretrain.models.heads.margin_head import NormProduct
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from enc_plugin import ENCConv2d, ENCLinear, audit, to_enc
from enc_plugin.layers.reparametrized import deep_copy
from enc_plugin.models import WNConv2d


class PadsInForward(nn.Conv2d):
    """Pads unevenly, and with a value that is not 0."""

    def forward(self, x):
        return super().forward(F.pad(x, (2, 0, 1, 3), value=5.0))


class ReflectsInForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 2, 2, 1), mode="reflect"))


class EqualLearningRate(nn.Conv2d):
    """Of StyleGAN: the weight takes its scale at run time."""

    def forward(self, x):
        return F.conv2d(x, self.weight * 0.3, self.bias, self.stride, self.padding)


class ScaledBehind(nn.Conv2d):
    """Weight normalization as a factor of the output."""

    def forward(self, x):
        norm = self.weight.flatten(1).norm(dim=1).view(1, -1, 1, 1)
        return F.conv2d(x, self.weight, None, self.stride, self.padding) / norm + self.bias.view(1, -1, 1, 1)


class ConvAdapter(nn.Conv2d):
    """An adapter of low rank beside the convolution."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down = nn.Conv2d(self.in_channels, 2, self.kernel_size, self.stride, self.padding, bias=False)
        self.up = nn.Conv2d(2, self.out_channels, 1, bias=False)

    def forward(self, x):
        return super().forward(x) + 2 * self.up(self.down(x))


class Unfolds(nn.Conv2d):
    def forward(self, x):
        columns = F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)
        return (self.weight.flatten(1).tanh() @ columns).unflatten(2, x.shape[2:])  # as many as with padding 'same'


class LinearAdapter(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down, self.up = nn.Linear(self.in_features, 2, bias=False), nn.Linear(2, self.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + 0.5 * self.up(self.down(x))


class Centered(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def old(function, layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(layer)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


def enc(layer, **kwargs):
    to_enc(layer, **kwargs)
    return layer


CONVS = {
    "weight normalization": lambda: WNConv2d(4, 6, 3, padding=1),
    "mmcv ConvWS2d": lambda: ConvWS2d(4, 6, 3, stride=2, padding=1),
    "mmcv ConvAWS2d": lambda: ConvAWS2d(4, 6, 3, padding=1, bias=False),
    "timm StdConv2d": lambda: timm.layers.StdConv2d(4, 6, 3, padding=1),
    "timm StdConv2dSame": lambda: timm.layers.StdConv2dSame(4, 6, 3, stride=2),
    "timm ScaledStdConv2d": lambda: timm.layers.ScaledStdConv2d(4, 6, 3, padding=1),
    "timm ScaledStdConv2dSame": lambda: timm.layers.ScaledStdConv2dSame(4, 6, 3, stride=2),
    "timm Conv2dSame": lambda: timm.layers.Conv2dSame(4, 6, 3, stride=2, groups=2),
    "mmcv Conv2dAdaptivePadding": lambda: Conv2dAdaptivePadding(4, 6, 3, stride=2, dilation=2),
    "same padding of an even kernel": lambda: nn.Conv2d(4, 6, (2, 4), padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(4, 6, 5, padding=2, padding_mode="replicate", groups=2),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), stride=2, padding_mode="circular"),
    "uneven padding in forward": lambda: PadsInForward(4, 6, 3),
    "reflection in forward": lambda: ReflectsInForward(4, 6, 3, stride=2),
    "parametrized by weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
    "parametrized by spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
    "old weight norm": lambda: old(weight_norm, nn.Conv2d(4, 6, 3)),
    "old spectral norm": lambda: old(spectral_norm, nn.Conv2d(4, 6, 3)),
    "pruned": lambda: pruned(nn.Conv2d(4, 6, 3, padding=1)),
    "pruned ENC": lambda: pruned(ENCConv2d(4, 6, 3, padding=1)),
    "ENC of a same-padding layer": lambda: enc(timm.layers.Conv2dSame(4, 6, 3, stride=2)),
    "ENC of a layer that pads": lambda: enc(PadsInForward(4, 6, 3), variant="wn", alpha=2.0),
    "equalized learning rate": lambda: EqualLearningRate(4, 6, 3, padding=1),
    "scaled behind": lambda: ScaledBehind(4, 6, 3, padding=1),
    "adapter": lambda: ConvAdapter(4, 6, 3, padding=1, stride=2),
    "unfolded": lambda: Unfolds(4, 6, 3, padding=1, bias=False),
    "1-D": lambda: nn.Conv1d(4, 6, 3, padding=1, dilation=2, padding_mode="circular"),
    "3-D": lambda: torchvision.models.video.resnet.Conv3DNoTemporal(4, 6),
}
LINEARS = {
    "plain": lambda: nn.Linear(5, 6),
    "ENC": lambda: ENCLinear(5, 6),
    "adapter": lambda: LinearAdapter(5, 6),
    "centered": lambda: Centered(5, 6),
    "parametrized by spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(5, 6)),
    "old weight norm": lambda: old(weight_norm, nn.Linear(5, 6)),
    "pruned ENC": lambda: pruned(ENCLinear(5, 6, variant="wn")),
}


def jacobian(layer, x):
    """``(out, *positions, in, *size)`` of the layer in eval mode, on one sample in float64."""
    return torch.autograd.functional.jacobian(layer.double().eval(), x.double())[0].squeeze(x.ndim - 1)


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_counts_with_the_kernel_and_the_padding_that_it_uses(name):
    torch.manual_seed(0)
    layer = CONVS[name]()
    x = torch.randn(1, 4, *[4 if layer.weight.ndim == 5 else 7] * (layer.weight.ndim - 2))
    state, weight = copy.deepcopy(layer.state_dict()), layer.eval().weight.detach().clone()
    layer.train()
    (row,) = audit(layer, folded=True, inputs=x)
    assert layer.training
    assert torch.equal(layer.eval().weight, weight)
    assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())

    assert row.map_sq_norm == pytest.approx(jacobian(layer, x).square().sum().item(), rel=1e-5)
    # The kernel: one output position whose whole neighbourhood is inside.
    wide = jacobian(layer, torch.zeros(1, 4, *[7 if x.ndim == 5 else 13] * (x.ndim - 2)))
    centre = wide[(slice(None), *(n // 2 for n in wide.shape[1 : x.ndim - 1]))]
    assert row.sq_norm == pytest.approx(centre.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_layer_counts_with_the_matrix_that_it_uses(name):
    torch.manual_seed(0)
    layer = LINEARS[name]()
    for shape in ((2, 5), (2, 3, 5)):
        x = torch.randn(shape)
        (row,) = audit(layer, folded=True, inputs=x)
        literal = jacobian(deep_copy(layer), x[:1]).square().sum().item()
        assert row.map_sq_norm == pytest.approx(literal, rel=1e-5)
        assert row.sq_norm == pytest.approx(literal / math.prod(shape[1:-1]), rel=1e-5)


def test_the_norms_behind_fold_into_the_weight_that_is_used():
    torch.manual_seed(0)
    model = nn.Sequential(ConvWS2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)).eval()
    model[1].running_var.uniform_(0.3, 3)
    model[1].weight.data.uniform_(0.3, 3)
    x = torch.randn(1, 3, 6, 6)
    (row,) = audit(model, folded=True, inputs=x)
    assert row.norms == ("1",)
    assert row.map_sq_norm == pytest.approx(jacobian(model, x).square().sum().item(), rel=1e-5)


class Activated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Dynamic(nn.Conv2d):
    """The weight depends on the input."""

    def forward(self, x):
        return F.conv2d(x, self.weight * x.mean().exp(), self.bias)


class Gated(nn.Linear):
    def forward(self, x, gate):
        return super().forward(x) * gate


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (NormProduct(4, 6), (2, 4), "NormProduct is not a linear map of its input"),
        (Activated(4, 6, 3), (2, 4, 6, 6), "Activated is not a linear map of its input"),
        (Dynamic(4, 6, 3), (2, 4, 6, 6), "Dynamic is not a linear map of its input"),
    ],
)
def test_a_layer_that_is_no_linear_map_has_no_norm_and_is_named(layer, shape, reason):
    table = audit(nn.Sequential(layer), folded=True, inputs=torch.randn(shape))
    assert math.isnan(table[0].sq_norm)
    assert math.isnan(table.kernel_chain["log_product"])
    assert math.isnan(table.map_chain["log_product"])
    assert reason in table.unclear["0"]
    assert f"no norm: 0 ({reason}" in str(table)


def test_a_layer_that_does_not_run_on_its_own_has_no_norm_and_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = Gated(4, 3)

        def forward(self, x):
            return self.fc(x, x.mean())

    table = audit(Net(), folded=True, inputs=torch.randn(2, 4))
    assert "Gated does not run outside of the network" in table.unclear["fc"]


def test_a_kernel_too_large_for_its_jacobian_has_a_norm_but_no_map_norm():
    layer = ConvAdapter(3, 8, 3, padding=1)
    (row,) = audit(layer, folded=True, inputs=torch.randn(1, 3, 32, 32))
    assert row.sq_norm > 0
    assert row.map_sq_norm is None
