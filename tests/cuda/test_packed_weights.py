"""The weights of a network at once, on the device: torch's operations and Triton's kernels against the layers' own."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from networks import batch, error, network, optimizer_of, stepper

from enc_plugin import packed
from enc_plugin.functional import VARIANTS
from enc_plugin.kernels import together
from enc_plugin.layers import enc_layers


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("with_triton", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_that_of_the_layers(device, variant, layout, dtype, with_triton, monkeypatch):
    kernels = together._triton() if with_triton else None
    monkeypatch.setattr(together, "_triton", lambda: kernels)
    if kernels is not None:
        kernels._is_right.clear()  # another test may have had its trial
        kernels._tables.clear()
    elif with_triton:
        pytest.skip("no Triton")
    own = network(variant).to(device=device, memory_format=layout)
    at_once = copy.deepcopy(own)
    images, labels = batch(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ENC")  # as when the kernels do not pass their trial
        for net, is_packed in ((own, False), (at_once, True)):
            packed.pack_weights(net, is_packed)
            stepper(net, optimizer_of(net), images.contiguous(memory_format=layout), labels, dtype)()
    assert kernels is None or kernels._tables, "the kernels were not used"
    tolerance = 1e-5 if dtype is None else 2e-2
    for (_, a), (_, b) in zip(enc_layers(own), enc_layers(at_once), strict=True):
        assert error(b.weight.grad, a.weight.grad) < tolerance
        assert b.weight.grad.stride() == a.weight.grad.stride() or 1 in a.weight.shape


def test_weights_are_computed_together_by_default(device, monkeypatch):
    asked = []
    monkeypatch.setattr(packed, "effective_weights", lambda weights, *rest: asked.append(len(weights)) or weights)
    net = network().to(device)
    net(batch(device)[0])
    assert sum(asked) == len(list(enc_layers(net)))
