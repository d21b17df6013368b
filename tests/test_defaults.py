"""torch.set_default_device and set_default_dtype do not matter: each tensor has the device and dtype it needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d
from torch import nn
from torch.utils._pytree import tree_leaves

from enc_plugin import audit, fold, to_enc
from enc_plugin.functional import bound_chain, conv_map_sq_norm, gbr, gbr_penalty, pgd
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


def _everything(device: str | None = None, dtype: torch.dtype = torch.float32) -> list:
    """Numbers of measurements, of a conversion, and of the networks before and after it."""
    torch.manual_seed(0)
    first = [Conv2dSame(3, 8, 3, 2), BatchNormAct2d(8), ScaledStdConv2d(8, 8, 3), _Scaled(8, 8, 3), nn.BatchNorm2d(8)]
    model = nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    x, labels = torch.rand(4, 3, 16, 16, requires_grad=True), torch.arange(4)
    with _defaults(device, dtype):
        found = [gbr(model, x, projections=2), pgd(model, x, labels, 0.1), gbr_penalty(x, model(x))]
        found += [*bound_chain([2.0, model[0].weight]).values(), conv_map_sq_norm(model[0].weight, [8, 8])]
        with pytest.warns(UserWarning, match="1 of 3 layers of Sequential stay plain"):
            report = to_enc(model, exclude="3")
        found += [len(report), report.num_post_norms, sum("_before_update" in vars(m) for m in model.modules())]
        found += [audit(model).max_deviation, *audit(model, folded=True, inputs=x).map_chain.values(), fold(model)(x)]
    found += [layer.effective_weight for _, layer in enc_layers(model)]
    drop_averages(model)
    return found


@pytest.mark.parametrize("settings", [dict(device="meta"), dict(dtype=torch.float64), dict(dtype=torch.bfloat16)])
def test_default_device_and_dtype_do_not_change_results(settings):
    # On meta, a tensor without an explicit device would have no values.
    for found, expected in zip(_everything(**settings), _everything(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(torch.as_tensor(x).isfinite().all() for x in tree_leaves(_everything()))
