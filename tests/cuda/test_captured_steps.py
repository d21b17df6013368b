"""The graph of a training step that the benchmark replays."""

from __future__ import annotations

import gc

import pytest
import torch
from networks import TOLERANCE, batch, errors, network, optimizer_of, stepper

from lab.bench.on_gpu import captured, host_ms


@pytest.mark.usefixtures("exact_float32")
def test_a_captured_step_trains_and_keeps_what_it_uses(device):
    images, labels = batch(device)
    nets = [network().to(device) for _ in range(2)]
    replay = captured(stepper(nets[0], optimizer_of(nets[0], fused=True), images, labels))  # after three steps
    gc.collect()
    others = [torch.full_like(p, torch.nan) for net in nets for p in net.parameters()]  # takes memory that is free
    eager = stepper(nets[1], optimizer_of(nets[1], fused=True), images, labels)
    for _ in range(2):
        replay()
    for _ in range(5):
        eager()
    assert errors(*nets) < TOLERANCE
    assert all(other.isnan().all() for other in others)
    assert 0 < host_ms(replay) < 1e3
