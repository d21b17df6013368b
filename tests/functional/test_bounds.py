import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from enc_plugin import to_enc
from enc_plugin.functional import (
    VARIANTS,
    bound_chain,
    conv_map_sq_norm,
    gbr,
    map_spectral_norm,
    residual_log_bound,
    robustness_delta,
    robustness_gap,
)


@st.composite
def mlps(draw):
    """Bias-free ReLU or Sigmoid MLP in float64 of random widths, depth and scale, and inputs for it."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    widths = draw(st.lists(st.integers(3, 9), min_size=2, max_size=6))
    activation = draw(st.sampled_from([nn.ReLU, nn.Sigmoid]))
    layers = []
    for size_in, size_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(size_in, size_out, bias=False), activation()]
    net = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(10 ** draw(st.floats(-2, 2)))
    return net, torch.randn(8, widths[0], dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 30.0]))


@given(mlps())
def test_gbr_is_at_most_the_product_which_is_at_most_the_mean_power(case):
    net, x = case
    chain = bound_chain(net.parameters())
    assert gbr(net, x).max().item() <= chain["product"] * (1 + 1e-9)
    assert chain["log_product"] <= chain["log_mean_power"]


@given(mlps(), st.sampled_from(sorted(VARIANTS)), st.floats(0.1, 10))
def test_equal_norms_make_the_second_step_an_equality(case, variant, alpha):
    net, x = case
    to_enc(net, variant=variant, alpha=alpha, post_norm=False)
    weights = [layer.effective_weight for layer in net if isinstance(layer, nn.Linear)]
    chain = bound_chain(weights)
    assert chain["log_mean_power"] - chain["log_product"] == pytest.approx(0, abs=1e-9)
    assert chain["log_product"] == pytest.approx(len(weights) * math.log(alpha), abs=1e-9)
    assert gbr(net, x).max().item() <= chain["product"] * (1 + 1e-9)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_the_chain_is_eq_17_written_out(norms):
    weights = [torch.full((2, 3), math.sqrt(n / 6), dtype=torch.float64) for n in norms]
    chain = bound_chain(weights)
    assert chain["product"] == pytest.approx(math.prod(norms), rel=1e-9)
    assert chain["mean_power"] == pytest.approx((sum(norms) / len(norms)) ** len(norms), rel=1e-9)
    assert bound_chain(norms)["log_product"] == pytest.approx(chain["log_product"], rel=1e-9, abs=1e-9)
    assert set(chain) == {"product", "mean_power", "log_product", "log_mean_power"}


def test_a_thousand_layers_do_not_overflow():
    chain = bound_chain([torch.eye(10) * 10] * 1000)
    assert chain["log_product"] == pytest.approx(1000 * math.log(1000))
    assert chain["log_mean_power"] == pytest.approx(chain["log_product"])
    assert chain["product"] == chain["mean_power"] == math.inf
    assert bound_chain([torch.eye(10) / 10] * 1000)["product"] == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_that_float32_cannot_hold_are_counted(scale):
    chain = bound_chain([torch.ones(2, 2) * scale])
    assert chain["log_product"] == pytest.approx(math.log(4) + 2 * math.log(scale))


def test_a_zero_layer_makes_the_product_zero_and_nan_stays_nan():
    chain = bound_chain([torch.zeros(2, 2), torch.eye(2)])
    assert chain["product"] == 0
    assert chain["mean_power"] == pytest.approx(1)
    assert math.isnan(bound_chain([torch.full((2, 2), math.nan), torch.eye(2)])["log_mean_power"])


def test_a_chain_of_nothing_or_of_negative_norms_is_refused():
    with pytest.raises(ValueError, match="weights: expected at least one layer"):
        bound_chain([])
    with pytest.raises(ValueError, match="weights: .*not negative, got -1"):
        bound_chain([-1.0])


def test_vectors_are_refused_because_a_bias_of_zero_would_make_the_bound_zero():
    with pytest.raises(ValueError, match=r"weights: .*vector of shape \(3,\).*leave out biases"):
        bound_chain(nn.Linear(4, 3).parameters())


def test_the_bound_of_a_convolutional_network_needs_the_maps_and_not_the_kernels():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 2, 1, bias=False)
    with torch.no_grad():
        first.weight.abs_()
        second.weight.abs_()
    found = gbr(nn.Sequential(first, nn.ReLU(), second), torch.rand(4, 3, 16, 16)).min()
    kernels = bound_chain([first.weight, second.weight])["product"]
    maps = bound_chain([conv_map_sq_norm(first.weight, (16, 16), padding=1), conv_map_sq_norm(second.weight, (16, 16))])
    assert kernels < found < maps["product"]


@given(
    delta_s=st.floats(0, 10),
    n=st.integers(1, 10**6),
    cells=st.integers(1, 1000),
    loss=st.floats(0, 10),
    delta=st.floats(1e-6, 1),
)
def test_theorem_1_as_it_is_printed(delta_s, n, cells, loss, delta):
    expected = delta_s + loss * math.sqrt((2 * cells * math.log(2) + 2 * math.log(1 / delta)) / n)
    assert robustness_gap(delta_s, n, cells, loss, 1 - delta) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"delta_s": -1}, {"n": 0}, {"num_cells": 0}, {"loss_bound": -1}, {"confidence": 1.0}, {"confidence": -0.1}],
)
def test_theorem_1_names_an_argument_out_of_range(wrong):
    arguments = {"delta_s": 0.1, "n": 10, "num_cells": 2, "loss_bound": 1.0, "confidence": 0.9} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        robustness_gap(**arguments)


@given(norm=st.floats(1e-3, 1e3), lipschitz=st.floats(1e-2, 10), diameter=st.floats(1e-3, 10))
def test_theorem_2_holds_with_equality_for_the_certified_delta(norm, lipschitz, diameter):
    classes = robustness_delta(norm, lipschitz, diameter)
    assert classes / (lipschitz * diameter) == pytest.approx(norm)
    values = robustness_delta(torch.tensor([norm], dtype=torch.float64), lipschitz, diameter, task="regression")
    assert ((values - diameter) / (lipschitz * diameter)).item() == pytest.approx(norm, rel=1e-6, abs=1e-9)


def test_the_certified_delta_bounds_the_change_of_a_loss_within_a_cell():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    cell = torch.rand(4000, 3, dtype=torch.float64) * 0.1
    steepest = gbr(net, cell, batch_size=4000).max().sqrt()
    delta = robustness_delta(steepest, lipschitz=1.0, cell_diameter=0.1 * math.sqrt(3))
    loss = net(cell).detach().abs()  # 1-Lipschitz in the prediction
    assert 0 < loss.max() - loss.min() <= delta


@pytest.mark.parametrize(("wrong", "name"), [({"task": "ranking"}, "task"), ({"lipschitz": 0}, "lipschitz")])
def test_theorem_2_names_a_wrong_argument(wrong, name):
    with pytest.raises(ValueError, match=name):
        robustness_delta(**{"gradient_norm": 1.0, "lipschitz": 1.0, "cell_diameter": 1.0, **wrong})


def test_a_network_that_has_diverged_gets_no_bound():
    assert all(math.isnan(value) for value in bound_chain([math.nan, 2.0]).values())


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
