"""Weights that go back to the constraint set in place: one by one, in blocks of rows, and together."""

from __future__ import annotations

import pytest
import torch
from functional.test_grouped import Operations, free_weights
from functional.test_weights import literal

from enc_plugin.functional import VARIANTS, grouped
from enc_plugin.functional.retraction import retract_, retract_together_, turn_, turn_together_
from enc_plugin.functional.rotation import rotate

WAYS = dict(argvalues=[(retract_, turn_), (retract_together_, turn_together_)], ids=["one by one", "together"])


@pytest.fixture(params=[2**18, 40], ids=["whole", "blocks"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(grouped, "_BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("retract", "turn"), **WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_weights_are_taken_to_the_set_in_place_and_in_their_layout(variant, retract, turn):
    weights = [weight.detach() for weight in free_weights()]
    expected = [literal(weight, variant, 2.0) for weight in weights]
    layouts = [weight.stride() for weight in weights]
    retract(weights, variant, 2.0)
    torch.testing.assert_close(weights, expected)
    assert [weight.stride() for weight in weights] == layouts


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("retract", "turn"), **WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_step_is_replaced_by_a_turn_in_its_direction(variant, retract, turn):
    weights = [weight.detach() for weight in free_weights()]
    retract(weights, variant, 2.0)
    before = [weight.clone() for weight in weights]
    steps = [torch.randn_like(weight) for weight in weights]
    steps[1].mul_(0)  # does not turn
    torch._foreach_add_(weights, steps, alpha=1e-3)
    turn(weights, before, 0.3, variant, 2.0)
    expected = [rotate(old, step, 0.3, variant) for old, step in zip(before, steps, strict=True)]
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights[1], before[1])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_operations_of_a_turn_do_not_grow_with_the_number_of_layers(variant):
    def operations(number: int) -> int:
        weights = [torch.randn(4, 6) for _ in range(number)]
        retract_together_(weights, variant, 1.0)
        before = [weight.clone() for weight in weights]
        torch._foreach_add_(weights, [torch.randn_like(weight) for weight in weights])
        with Operations() as counted:
            turn_together_(weights, before, 0.1, variant, 1.0)
        return counted.names.total() - counted.names["full"]  # constants are kept

    operations(2), operations(20)
    assert operations(2) == operations(20) <= 48


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_weights_are_projected_together_without_a_look_at_their_values(variant):
    weights, before = ([torch.empty(4, 6, device="meta") for _ in range(3)] for _ in range(2))
    retract_together_(weights, variant, 1.0)
    turn_together_(weights, before, torch.empty((), device="meta"), variant, 1.0)
