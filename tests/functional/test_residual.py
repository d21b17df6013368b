"""The residual bound against exact Jacobians, spectral norms against singular values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from enc_plugin.functional import conv_map_sq_norm, gbr, map_spectral_norm, residual_log_bound


def matrix_of(function, shape) -> torch.Tensor:
    x = torch.zeros(shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(function, x)
    return jacobian.reshape(-1, x.numel())


@pytest.mark.parametrize("stride", [1, 2])
def test_spectral_norm_of_a_convolution_with_batch_norm_is_its_largest_singular_value(stride):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride, padding=1), nn.BatchNorm2d(4)).double().eval()
    layer[1].running_var.uniform_(0.1, 2)
    want = torch.linalg.svdvals(matrix_of(layer, (1, 3, 6, 6)))[0].item()
    found = map_spectral_norm(layer, torch.zeros(1, 3, 6, 6, dtype=torch.float64), tolerance=1e-9)
    assert found == pytest.approx(want, rel=1e-4)
    assert found <= want * (1 + 1e-9), "power iteration comes from below"


def test_a_constant_map_has_norm_0():
    assert map_spectral_norm(lambda x: x * 0 + 3, torch.zeros(1, 5)) == 0


def test_a_map_that_is_not_affine_is_refused():
    with pytest.raises(ValueError, match="affine"):
        map_spectral_norm(torch.relu, torch.zeros(1, 5))


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    map_spectral_norm(nn.Identity(), torch.zeros(1, 5))
    assert torch.equal(torch.get_rng_state(), before)


class Residual(nn.Module):
    """Stem, two blocks (one with a projection shortcut), pooling, classifier; no biases."""

    def __init__(self, scale: float):
        super().__init__()
        conv = dict(kernel_size=3, padding=1, bias=False)
        self.stem = nn.Conv2d(2, 4, **conv)
        self.branches = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(4, 4, **conv), nn.Conv2d(4, 4, **conv)]) for _ in range(2)]
        )
        self.shortcut = nn.Conv2d(4, 4, 1, bias=False)
        self.fc = nn.Linear(4, 3, bias=False)
        self.double()
        for parameter in self.branches.parameters():
            parameter.data.mul_(scale)

    def forward(self, x):
        x = self.stem(x).relu()
        for (first, second), shortcut in zip(self.branches, (nn.Identity(), self.shortcut), strict=True):
            x = (shortcut(x) + second(first(x).relu())).relu()
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_gbr_stays_below_the_residual_bound(scale):
    torch.manual_seed(0)
    net, size = Residual(scale), (5, 5)
    inputs = torch.randn(16, 2, *size, dtype=torch.float64)

    def frobenius(layer):
        return conv_map_sq_norm(layer.weight, size, padding=layer.padding).sqrt().item()

    hidden = torch.zeros(1, 4, *size, dtype=torch.float64)
    shortcuts = [1.0, map_spectral_norm(net.shortcut, hidden)]
    blocks = [(s, [frobenius(layer) for layer in branch]) for s, branch in zip(shortcuts, net.branches, strict=True)]
    fc_sq_norm = net.fc.weight.square().sum().item()
    bound = residual_log_bound(fc_sq_norm, map_spectral_norm(net.stem, inputs[:1]), blocks)
    values = gbr(net.eval(), inputs).log()
    assert values.max().item() <= bound
    if scale == 0.05:  # the shortcuts carry the signal past small branches
        branches = sum(math.log(frobenius(layer)) for branch in net.branches for layer in branch)
        product = 2 * (math.log(frobenius(net.stem)) + branches) + math.log(fc_sq_norm)
        assert product < values.min().item(), "the product over all layers is no bound"


def test_a_norm_that_is_negative_is_refused():
    with pytest.raises(ValueError, match="blocks"):
        residual_log_bound(1.0, 1.0, [(1.0, [-1.0])])
