"""Weights, their gradients and the shifted decay on the device: float64 on the CPU is the oracle."""

from __future__ import annotations

import pytest
import torch
from networks import error

from enc_plugin import ENCConv2d
from enc_plugin.functional import VARIANTS, enc_weight, shifted_l2_grad

SHAPES = [(64, 3, 7, 7), (256, 128, 3, 3), (1024, 256, 1, 1), (1000, 2048), (48, 1, 3, 3)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_gradients_and_decay_are_those_of_float64(device, variant, shape, layout):
    if len(shape) == 2 and layout is not torch.contiguous_format:
        pytest.skip("a matrix has one layout")
    exact = (0.02 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weight = exact.detach().float().to(device).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(shape)
    for alpha in (1.0, 2.5):
        found, expected = enc_weight(weight, variant, alpha), enc_weight(exact, variant, alpha)
        assert error(found, expected) < 1e-5
        assert found.double().square().sum().item() == pytest.approx(alpha, rel=1e-5)
        (of_found,) = torch.autograd.grad(found, weight, grad.to(device))
        (of_expected,) = torch.autograd.grad(expected, exact, grad.double())
        assert error(of_found, of_expected) < 2e-5
    decay = shifted_l2_grad(weight.detach(), variant, 1e-3)
    assert error(decay, shifted_l2_grad(exact.detach(), variant, 1e-3)) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives_are_those_of_float64(device, variant):
    exact = torch.randn(6, 3, 3, 3, dtype=torch.float64).requires_grad_()
    weight = exact.detach().float().to(device).requires_grad_()
    found = []
    for w in (weight, exact):
        (grad,) = torch.autograd.grad(enc_weight(w, variant).pow(3).sum(), w, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), w)[0])
    assert error(*found) < 1e-4


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_of_half_precision_are_taken_in_float32(device, variant, dtype):
    weight = (0.02 * torch.randn(256, 128, 3, 3)).to(dtype)
    found = enc_weight(weight.to(device), variant)
    assert found.dtype is dtype
    assert error(found, enc_weight(weight.double(), variant)) < HALF[dtype]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_with_a_learnable_alpha_and_a_pruned_one_compute_as_on_the_cpu(device, variant):
    layer = ENCConv2d(8, 16, 3, variant=variant, alpha="learnable")
    with torch.no_grad():
        layer.enc_log_alpha.fill_(0.3)
    x = torch.randn(2, 8, 6, 6)
    expected = layer(x)
    expected.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer.to(device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = layer(x.to(device))
        found.square().sum().backward()
    assert error(found, expected) < 1e-5
    assert all(error(p.grad, grads[name]) < 1e-4 for name, p in layer.named_parameters())
    kept = (torch.rand(16, 8, 3, 3) > 0.5).float()
    weight = torch.randn(16, 8, 3, 3)
    expected = enc_weight(weight.double(), variant, 1.0, kept.double())
    assert error(enc_weight(weight.to(device), variant, 1.0, kept.to(device)), expected) < 1e-5
