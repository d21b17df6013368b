"""The epsilon-shifted L2 regularizer against literal formulas and against autograd on the regularizer itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from enc_plugin.functional import VARIANTS, decay_efolds, shifted_l2_grad

ALL = tuple(VARIANTS)


def literal(weight: Tensor, variant: str, eps: float) -> Tensor:
    """The gradient as the paper's authors write it, row by row; whole-layer variants are one row."""
    rows = weight.reshape(1, -1) if variant in ("fro", "centered_fro") else weight.flatten(1)
    out = []
    for row in rows:
        if variant in ("ws", "centered_fro"):
            mean = row.mean()
            out.append((1 - eps / row.std(correction=0)) * (row - mean) + mean)
        else:
            out.append((1 - eps / row.norm()) * row)
    return torch.stack(out).view_as(weight)


def regularizer(weight: Tensor, variant: str, eps: float) -> Tensor:
    rows = weight.reshape(1, -1) if variant in ("fro", "centered_fro") else weight.flatten(1)
    if variant in ("ws", "centered_fro"):
        spread = (rows.std(dim=1, correction=0) - eps).square() + rows.mean(1).square()
        return 0.5 * rows.shape[1] * spread.sum()
    return 0.5 * (rows.norm(dim=1) - eps).square().sum()


@given(st.tuples(st.integers(1, 6), st.integers(2, 6)), st.sampled_from(ALL), st.floats(0, 3), st.integers(0, 2**31))
def test_equals_the_literal_formula_and_the_gradient_of_the_regularizer(shape, variant, eps, seed):
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3
    grad = shifted_l2_grad(weight, variant, eps)
    torch.testing.assert_close(grad, literal(weight, variant, eps))
    free = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(regularizer(free, variant, eps), free)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("variant", ALL)
def test_zero_shift_is_plain_decay(variant):
    weight = torch.randn(4, 3, 3, 3)
    assert torch.equal(shifted_l2_grad(weight, variant, 0.0), weight)


@pytest.mark.parametrize("variant", ALL)
def test_descent_settles_at_the_shift(variant):
    """Weights whose length (row norm, or row standard deviation) is below eps grow, above it shrink, and stay at it."""
    eps = 0.5
    for start in (0.01, 5.0):
        weight = start * torch.randn(4, 9, dtype=torch.float64)
        for _ in range(400):
            weight = weight - 0.1 * shifted_l2_grad(weight, variant, eps)
        rows = weight.reshape(1, -1) if variant in ("fro", "centered_fro") else weight
        length = rows.std(dim=1, correction=0) if variant in ("ws", "centered_fro") else rows.norm(dim=1)
        torch.testing.assert_close(length, torch.full_like(length, eps))


@pytest.mark.parametrize("eps", [-1e-3, float("nan"), float("inf")])
def test_a_bad_shift_is_refused(eps):
    with pytest.raises(ValueError, match="eps: expected a finite number >= 0"):
        shifted_l2_grad(torch.ones(2, 2), "fro", eps)


def log_sq_norm_lost(optimizer, weight, gradient, learning_rates) -> float:
    """By how much log ||W||^2 falls when ``optimizer`` takes a step of ``gradient()`` at each learning rate."""
    start = weight.detach().square().sum().log()
    for lr in learning_rates:
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = gradient()
        optimizer.step()
    return (start - weight.detach().square().sum().log()).item()


@pytest.mark.parametrize("settings", [dict(), dict(momentum=0.9), dict(momentum=0.5, dampening=0.3)])
def test_efolds_are_what_decay_alone_takes_from_the_squared_norm(settings):
    weight = nn.Parameter(torch.randn(4, 9, dtype=torch.float64))
    learning_rates = [0.1] * 400 + [0.01] * 200
    optimizer = torch.optim.SGD([weight], lr=1.0, weight_decay=1e-3, **settings)
    lost = log_sq_norm_lost(optimizer, weight, lambda: torch.zeros_like(weight), learning_rates)
    assert decay_efolds(learning_rates, 1e-3, **settings) == pytest.approx(lost, rel=0.02)


def test_efolds_of_decoupled_decay_take_no_momentum():
    weight = nn.Parameter(torch.randn(4, 9, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.1)
    lost = log_sq_norm_lost(optimizer, weight, lambda: torch.zeros_like(weight), [0.01] * 500)
    assert decay_efolds([0.01] * 500, 0.1) == pytest.approx(lost, rel=1e-3)


def test_efolds_hold_under_a_scale_invariant_loss():
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 9, dtype=torch.float64, generator=generator))

    def gradient():
        target = torch.randn(4, 9, dtype=torch.float64, generator=generator)
        loss = 1e-2 * (weight / weight.norm() * target).sum()  # of the direction alone
        return torch.autograd.grad(loss, weight)[0]

    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, weight_decay=5e-3)
    learning_rates = [0.01] * 1000  # short of the equilibrium, where the gradient adds what decay takes
    lost = log_sq_norm_lost(optimizer, weight, gradient, learning_rates)
    assert decay_efolds(learning_rates, 5e-3, momentum=0.9) == pytest.approx(lost, rel=0.02)


@pytest.mark.parametrize(("argument", "value"), [("momentum", 1.0), ("weight_decay", -1e-4), ("dampening", 2.0)])
def test_efolds_refuse_settings_out_of_range(argument, value):
    with pytest.raises(ValueError, match=argument):
        decay_efolds([0.1], **{"weight_decay": 1e-4, argument: value})


def test_efolds_of_one_rate_for_all_steps_ask_for_the_steps():
    with pytest.raises(TypeError, match=r"learning_rates: expected the rate of each step, .*\* steps, got float 0.1"):
        decay_efolds(0.1, 1e-4)
