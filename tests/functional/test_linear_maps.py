"""Norms of linear maps against literal matrices and their singular values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from enc_plugin.functional import conv_map_sq_norm, map_spectral_norm


@given(
    kernel=st.integers(1, 4),
    size=st.integers(5, 8),
    stride=st.integers(1, 3),
    padding=st.one_of(st.integers(0, 3), st.just("valid"), st.just("same")),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
def test_the_map_norm_is_that_of_the_literal_matrix(kernel, size, stride, padding, dilation, groups):
    if padding == "same":
        stride = 1
    weight = torch.randn(4, 4 // groups, kernel, 2, dtype=torch.float64)
    options = dict(stride=stride, padding=padding, dilation=dilation)
    if padding != "same" and size + 2 * (padding if padding != "valid" else 0) < dilation * (kernel - 1) + 1:
        return
    matrix = torch.autograd.functional.jacobian(
        lambda x: F.conv2d(x, weight, groups=groups, **options), torch.zeros(1, 4, size, 6, dtype=torch.float64)
    )
    found = conv_map_sq_norm(weight, (size, 6), **options)
    torch.testing.assert_close(found, matrix.square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_the_map_norm_holds_for_signals_and_volumes(dimensions):
    conv = {1: F.conv1d, 3: F.conv3d}[dimensions]
    weight, size = torch.randn(2, 3, *[3] * dimensions, dtype=torch.float64), [4, 5, 6][:dimensions]
    matrix = torch.autograd.functional.jacobian(
        lambda x: conv(x, weight, padding=1, stride=2), torch.zeros(1, 3, *size, dtype=torch.float64)
    )
    found = conv_map_sq_norm(weight, size, padding=1, stride=2)
    torch.testing.assert_close(found, matrix.square().sum(), rtol=1e-12, atol=0)


def test_a_size_that_does_not_fit_the_kernel_is_refused():
    with pytest.raises(ValueError, match="input_size: expected 2 sizes"):
        conv_map_sq_norm(torch.ones(1, 1, 3, 3), (4,))


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
