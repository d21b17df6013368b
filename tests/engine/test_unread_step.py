"""A step that was taken before anyone read its gradients can be undone, and reading is all that waits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from enc_plugin.engine.unread_step import UnreadStep, largest_magnitude


def stepped(value: float, **options) -> tuple[UnreadStep, nn.Module, dict, dict]:
    """A step of SGD with one gradient element of this value; weights and gradients of before it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    net[2].requires_grad_(False)
    net(torch.randn(5, 4)).square().sum().backward()
    net[0].weight.grad[1, 1] = value
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, **options)
    step = UnreadStep(net.parameters())
    optimizer.step()
    optimizer.zero_grad()
    return step, net, weights, gradients


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_of_gradients_that_are_not_finite_is_told_and_undone(value):
    step, net, weights, gradients = stepped(value)
    assert not net[0].weight.isfinite().all()
    assert not step.is_finite()
    step.undo()
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name].nan_to_num(), grad.nan_to_num()) for name, grad in gradients.items())


def test_gradients_whose_square_overflows_are_finite():
    assert stepped(3e38)[0].is_finite()


def test_without_gradients_there_is_nothing_to_tell():
    step = UnreadStep(nn.Linear(2, 2).parameters())
    step.undo()
    assert step.is_finite()
    assert largest_magnitude([None, torch.zeros(0)]) == 0


def test_taking_a_step_reads_nothing_from_the_device():
    """Tensors of the meta device have no values: whatever would read one raises."""
    net = nn.Linear(4, 3, device="meta")
    net(torch.empty(2, 4, device="meta")).sum().backward()
    step = UnreadStep(net.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        step.is_finite()
