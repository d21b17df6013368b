"""What surrounds a call does not matter: torch's default device, its default dtype, and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d
from torch import nn
from torch.utils._pytree import tree_leaves

from enc_plugin import audit, fold, to_enc
from enc_plugin.functional import bound_chain, conv_map_sq_norm, gbr, gbr_penalty, map_spectral_norm, pgd
from enc_plugin.functional.rotation import rotate
from enc_plugin.layers import enc_layers
from enc_plugin.surgery.startup_average import drop_averages


class _Scaled(nn.Conv2d):
    """A convolution with a factor behind it: its weight is measured by its Jacobian."""

    def forward(self, x):
        return 2 * super().forward(x)


@contextmanager
def _defaults(device: str | None = None, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def _everything(surroundings) -> list:
    """Numbers of measurements, of a conversion, and of the networks before and after it."""
    torch.manual_seed(0)
    first = [Conv2dSame(3, 8, 3, 2), BatchNormAct2d(8), ScaledStdConv2d(8, 8, 3), _Scaled(8, 8, 3), nn.BatchNorm2d(8)]
    model = nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    x, labels = torch.rand(4, 3, 16, 16, requires_grad=True), torch.arange(4)
    weight, outputs = model[0].weight.detach(), model(x)
    with surroundings():
        found = [gbr(model, x, projections=2), pgd(model, x, labels, 0.1)]
        with torch.autocast("cpu", enabled=False):  # a part of training, which autocast is for
            found.append(gbr_penalty(x, outputs))
        found += [*bound_chain([2.0, weight]).values(), conv_map_sq_norm(weight, [8, 8])]
        found += [rotate(weight, weight.cos(), 0.1, "ws"), map_spectral_norm(model[0], x)]
        with pytest.warns(UserWarning, match="1 of 3 layers of Sequential stay plain"):
            report = to_enc(model, "wn", exclude="3", preserve=x)
        found += [len(report), report.num_post_norms, sum("_before_update" in vars(m) for m in model.modules())]
        found += [report.preserved.output_change < 1e-6, audit(model).max_deviation]
        found += [*audit(model, folded=True, inputs=x).map_chain.values()]
        folded = fold(model)
    drop_averages(model)
    return [*found, folded(x), model(x), *(layer.effective_weight for _, layer in enc_layers(model))]


@pytest.mark.parametrize(
    "surroundings",
    [
        partial(_defaults, "meta"),  # a tensor without an explicit device would have no values
        partial(_defaults, dtype=torch.float64),
        partial(_defaults, dtype=torch.bfloat16),
        partial(torch.autocast, "cpu", torch.bfloat16),
    ],
)
def test_measurements_and_conversion_do_not_depend_on(surroundings):
    expected = _everything(nullcontext)
    assert all(torch.as_tensor(x).isfinite().all() for x in tree_leaves(expected))
    for found, value in zip(_everything(surroundings), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=0)
