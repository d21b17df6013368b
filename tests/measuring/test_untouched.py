"""A block in which a model is measured leaves modes, buffers, flags, forwards and random states as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn

from enc_plugin.measuring.untouched import untouched


def test_untouched_restores_modes_buffers_flags_and_random_states():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3))
    model[1].eval()
    model[2].with_cp = True
    model[2].generator = torch.Generator().manual_seed(3)
    own_state = model[2].generator.get_state()
    mean = model[0].running_mean.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def measure():
        with untouched(model):
            assert not any(module.training for module in model.modules())
            assert not model[2].with_cp
            model[0].running_mean.fill_(7)
            torch.rand(1), np.random.rand(), random.random(), torch.rand(1, generator=model[2].generator)
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        measure()
    assert [module.training for module in model] == [True, False, True]
    assert model[2].with_cp
    assert torch.equal(model[0].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(model[2].generator.get_state(), own_state)
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_values_that_a_network_keeps_in_eval_mode_are_those_of_its_present_weights():
    class Caching(nn.Module):  # as the attention biases of timm's LeViT and EfficientFormer
        def __init__(self):
            super().__init__()
            self.factor, self.kept = nn.Parameter(torch.ones(())), None

        def train(self, mode=True):
            super().train(mode)
            if mode:
                self.kept = None

        def forward(self, x):
            self.kept = self.factor * 2 if self.kept is None or self.training else self.kept
            return x * self.kept

    model, found = nn.Sequential(Caching()), []
    for factor, mode in ((1, True), (3, True), (3, False), (5, False)):
        model.train(mode)
        model[0].factor.data.fill_(factor)
        with untouched(model), torch.enable_grad():
            found.append(model(torch.ones(1)).item())
        assert mode == model[0].training
        assert (model[0].kept is None) == mode
    assert found == [2, 6, 6, 10]


def test_untouched_unwraps_forwards_that_mmengine_checkpoints():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    turn_on_activation_checkpointing(model, ["0", "0", "1"])  # 0 twice
    wrapped = [module.forward for module in model]
    x = torch.rand(2, 3, requires_grad=True)
    with untouched(model), torch.enable_grad():
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(gradient, (model[1].weight @ model[0].weight).sum(0).expand(2, 3))
    assert all(module.forward is forward for module, forward in zip(model, wrapped, strict=True))
