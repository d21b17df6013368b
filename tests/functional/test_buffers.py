"""Buffers that a measured network replaces, registers or writes to are as before afterwards, also after an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from enc_plugin.functional import gbr
from enc_plugin.functional.buffers import kept_buffers
from enc_plugin.measuring.untouched import untouched


class Caching(nn.Linear):
    """Replaces, writes to and registers a buffer in each forward pass, as embeddings of positions do."""

    def __init__(self):
        super().__init__(4, 3)
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("written", torch.zeros(()))

    def forward(self, x):
        self.replaced = self.replaced + 1
        self.written += 1
        self.register_buffer("grid", torch.arange(float(len(x))))
        return super().forward(x)


def in_untouched(model, x):
    with untouched(model):
        model(x)


def interrupted(model, x):
    with pytest.raises(RuntimeError, match="shapes"), kept_buffers(model):
        model(x[:, :1])


@pytest.mark.parametrize("run", [gbr, in_untouched, interrupted])
def test_buffers_are_the_same_tensors_with_the_same_values(run):
    model = nn.Sequential(Caching(), nn.BatchNorm1d(3)).eval()
    before = dict(model.named_buffers())
    run(model, torch.randn(5, 4))
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert model[0].replaced == model[0].written == 0
