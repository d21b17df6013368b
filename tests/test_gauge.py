"""Norm-only ENC is a change of gauge: with batch norm behind every layer it trains exactly as the plain network does.

Batch norm makes a network invariant to the scale of each row, so the gradient with respect to W, and with it every step
of SGD with decay, is the same with What in W's place, but for batch norm's own eps. This is an oracle for layers,
surgery and optimizer at once; the centered variants, which remove the mean, must *not* pass it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from enc_plugin import to_enc
from enc_plugin.engine import ENCOptimWrapperConstructor

STEPS = 20


def network(bn_eps: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 8), (8, 8), (8, 12)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out, eps=bn_eps), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5, eps=bn_eps)]
    return nn.Sequential(*layers).double()


def losses(bn_eps: float, variant: str | None) -> torch.Tensor:
    model = network(bn_eps)
    if variant is not None:
        report = to_enc(model, variant)
        assert (len(report), report.num_post_norms) == (4, 0)
    optimizer = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-2)
    wrapper = ENCOptimWrapperConstructor(dict(optimizer=optimizer), dict(shift_eps=0))(model)
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(STEPS):
        images = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(5, (16,), generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        wrapper.update_params(loss)
        out.append(loss.detach())
    return torch.stack(out)


@pytest.mark.parametrize("variant", ["fro", "wn"])
def test_norm_only_variants_train_like_the_plain_network_as_batch_norm_eps_vanishes(variant):
    apart = {eps: (losses(eps, variant) - losses(eps, None)).abs().max().item() for eps in (1e-5, 1e-14)}
    assert apart[1e-14] < 1e-10
    assert apart[1e-5] > 1e-4, "batch norm's eps is what is left of the difference"


@pytest.mark.parametrize("variant", ["ws", "centered_fro"])
def test_centered_variants_train_differently(variant):
    assert (losses(1e-14, variant) - losses(1e-14, None)).abs().max().item() > 1e-3
