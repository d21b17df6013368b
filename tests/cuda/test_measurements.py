"""GBR and attacks on the device are those of float64 on the CPU, whatever precision a run has allowed."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import batch, error, network

from enc_plugin.functional import fgsm, gbr, gbr_penalty, pgd


@pytest.fixture(params=["float32", "TF32 allowed"])
def nets(request, device):
    """A network on the device and its twin in float64 on the CPU, in eval mode."""
    if request.param == "TF32 allowed":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    net = network()
    net(batch(torch.device("cpu"), 32)[0])  # statistics that say something
    twin = copy.deepcopy(net).double().eval()
    return net.to(device).eval(), twin


@pytest.mark.parametrize("projections", [None, 1, 3])
@pytest.mark.parametrize("output", ["logits", "probs", "label_prob"])
def test_gbr_is_that_of_float64(device, nets, output, projections):
    net, twin = nets
    images, labels = batch(device)
    options = dict(output=output, projections=projections, seeds=torch.arange(8))
    found = gbr(net, images, labels=labels, **options)
    expected = gbr(twin, images.cpu().double(), labels=labels.cpu(), **options)
    assert found.is_cuda == images.is_cuda
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=0)


def test_attacks_move_the_pixels_that_float64_moves(device, nets):
    net, twin = nets
    images, labels = batch(device)
    exact = images.cpu().double()
    for found, expected in (
        (fgsm(net, images, labels, 0.1), fgsm(twin, exact, labels.cpu(), 0.1)),
        (
            pgd(net, images, labels, 0.1, steps=2, random_start=False),
            pgd(twin, exact, labels.cpu(), 0.1, steps=2, random_start=False),
        ),
    ):
        differ = (found.cpu().double() - expected).abs() > 1e-6
        assert differ.double().mean() < 2e-3  # signs of gradients that are zero but for rounding


def test_measurements_restore_precision_and_the_random_states(device, nets):
    net, _ = nets
    images, labels = batch(device)
    settings = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    gbr(net, images, projections=1)
    fgsm(net, images, labels, 0.1)
    pgd(net, images, labels, 0.1, steps=2)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == settings
    assert all(
        torch.equal(a, b) for a, b in zip(states, (torch.get_rng_state(), torch.cuda.get_rng_state()), strict=True)
    )


@pytest.mark.usefixtures("exact_float32")
def test_the_penalty_draws_on_the_device_and_estimates_the_gbr(device):
    net = network().to(device).eval()
    images, _ = batch(device)
    exact = gbr(net, images).mean()
    x = images.clone().requires_grad_()
    out = net(x)
    torch.manual_seed(0)
    drawn = torch.stack([gbr_penalty(x, out).detach() for _ in range(300)])
    assert abs(drawn.mean() - exact) < 5 * drawn.std() / 300**0.5
    torch.manual_seed(0)
    torch.testing.assert_close(gbr_penalty(x, out).detach(), drawn[0], rtol=1e-4, atol=0)
    assert error(gbr_penalty(x, out, projections=10), exact) < 1e-4
