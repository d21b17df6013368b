"""Rotations on the constraint set, and the angle that plain training has in equilibrium."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from enc_plugin.functional import VARIANTS, enc_weight
from enc_plugin.functional.rotation import equilibrium_angle, rotate
from enc_plugin.functional.weights import num_rows

SHAPES = [(3, 5), (4, 2, 3, 3), (5, 3, 4)]


def on_the_set(shape, variant, alpha=1.0):
    return enc_weight(torch.randn(shape, dtype=torch.float64), variant, alpha)


def rows_of(weight, variant):
    return weight.reshape(num_rows(weight, variant), -1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotation_turns_every_row_by_the_angle_and_stays_on_the_set(variant, shape):
    weight, update = on_the_set(shape, variant, 2.0), torch.randn(shape, dtype=torch.float64)
    turned = rotate(weight, update, 0.3, variant)
    torch.testing.assert_close(turned, enc_weight(turned, variant, 2.0), rtol=0, atol=1e-13)
    cosine = torch.cosine_similarity(rows_of(turned, variant), rows_of(weight, variant))
    torch.testing.assert_close(cosine.acos(), torch.full_like(cosine, 0.3), rtol=1e-9, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_small_rotation_is_the_retraction_of_a_step_of_that_length(variant):
    # Both are the exponential map up to the second order in the length of the step.
    weight, update = on_the_set((4, 6), variant), torch.randn(4, 6, dtype=torch.float64)
    t = rows_of(rotate(weight, update, math.pi / 2, variant), variant)
    errors = []
    for angle in (1e-2, 1e-3):
        step = angle * t
        errors.append(
            (enc_weight(weight + step.reshape(4, 6), variant) - rotate(weight, update, angle, variant)).norm()
        )
    assert errors[1] < 2e-3 * errors[0]  # of third order


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_direction_is_that_of_the_gradient_of_the_reparametrization(variant):
    free = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight, update = enc_weight(free, variant), torch.randn(4, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weight * update).sum(), free)  # orthogonal to W, and without means
    moved = rows_of(rotate(weight.detach(), update, 1e-6, variant) - weight.detach(), variant)
    torch.testing.assert_close(
        F.normalize(moved, dim=1), F.normalize(rows_of(gradient, variant), dim=1), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_that_does_not_turn_a_row_leaves_it(variant):
    weight = on_the_set((4, 6), variant).float()
    for update in (torch.zeros(4, 6), weight * -0.3, weight * 7.7):
        assert torch.equal(rotate(weight, update, 0.1, variant), weight)


def test_a_rotation_in_bfloat16_is_that_in_float32_rounded_once():
    weight, update = on_the_set((4, 64), "ws").bfloat16(), torch.randn(4, 64).bfloat16()
    expected = rotate(weight.float(), update.float(), 0.2, "ws").bfloat16()
    assert torch.equal(rotate(weight, update, 0.2, "ws"), expected)


class _Recipe:
    """A scale-invariant weight under white noise: rows that are orthogonal to W, of length 1 / norm(W)."""

    def __init__(self, make, rows=64, columns=32):
        generator = torch.Generator().manual_seed(0)
        self.noise = lambda: torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(self.noise())
        self.optimizer = make([self.weight])

    def step(self):
        noise, w = self.noise(), self.weight.detach()
        noise -= (noise * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
        self.weight.grad = noise / w.norm(dim=1, keepdim=True)
        self.optimizer.step()

    def angle(self, settle: int, steps: int) -> float:
        """Root mean square angle of a step."""
        squares = []
        for step in range(settle + steps):
            before = self.weight.detach().clone()
            self.step()
            if step >= settle:
                squares.append(torch.cosine_similarity(before, self.weight.detach()).acos().square().mean())
        return math.sqrt(torch.stack(squares).mean())


LR, DECAY = 0.05, 0.1  # 0.01 e-folds of the squared norm a step


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda p: torch.optim.SGD(p, LR, weight_decay=DECAY), {}),
        (lambda p: torch.optim.SGD(p, LR, momentum=0.9, weight_decay=DECAY), dict(momentum=0.9)),
        (
            lambda p: torch.optim.SGD(p, LR, momentum=0.8, dampening=0.5, weight_decay=DECAY),
            dict(momentum=0.8, dampening=0.5),
        ),
        (
            lambda p: torch.optim.SGD(p, LR, momentum=0.9, nesterov=True, weight_decay=DECAY),
            dict(momentum=0.9, nesterov=True),
        ),
        (
            lambda p: torch.optim.AdamW(p, LR, betas=(0.9, 0.99), weight_decay=DECAY),
            dict(momentum=0.9, dampening=0.9),
        ),
    ],
    ids=["SGD", "momentum", "dampening", "Nesterov", "AdamW"],
)
def test_the_angle_of_equilibrium_is_the_one_that_plain_training_has(make, settings):
    measured = _Recipe(make).angle(settle=600, steps=200)
    assert measured == pytest.approx(equilibrium_angle(LR, DECAY, **settings), rel=0.03)


def test_the_angle_of_equilibrium_takes_a_learning_rate_on_the_device():
    assert equilibrium_angle(torch.tensor(0.1), 1e-4, 0.9) == pytest.approx(equilibrium_angle(0.1, 1e-4, 0.9))


@pytest.mark.parametrize(
    ("settings", "text"),
    [(dict(momentum=1.0), "momentum: expected"), (dict(weight_decay=-1), "weight_decay: expected")],
)
def test_settings_without_an_equilibrium_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        equilibrium_angle(**{"lr": 0.1, "weight_decay": 1e-4, **settings})
