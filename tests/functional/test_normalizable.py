"""Weights that cannot be normalised are refused by one rule, wherever they come from."""

from __future__ import annotations

import copy

import pytest
import torch
from functional.test_weights import ALL, literal
from torch import nn

from enc_plugin import ENCConv2d, audit, fold, to_enc
from enc_plugin.convert import enc_layers
from enc_plugin.functional import enc_weight
from enc_plugin.functional.weights import imprecise_rows


def broken(how: str, dtype=torch.float32) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, bias=False).to(dtype)
    with torch.no_grad():
        if how == "almost constant":
            conv.weight[2] = 0.3
            conv.weight[2, 0, 0, 0] = torch.nextafter(conv.weight[2, 0, 0, 0], conv.weight.new_tensor(1.0))
        else:
            conv.weight[2] *= float(how)
    return conv


@pytest.mark.parametrize("variant", ["wn", "ws"])
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("1e-25", r"of a magnitude \(.e-26\) whose square float32 cannot hold"),
        ("1e30", r"of a magnitude \(.e\+29\) whose square float32 cannot hold"),
        ("0", r"all zero \(0 / 0\)"),
        ("almost constant", "constant up to rounding"),
    ],
)
def test_a_row_that_float32_cannot_normalise_is_refused_everywhere(variant, how, why):
    if (variant, how) == ("wn", "almost constant"):
        return  # eq. 21 has no difficulty with it
    message = f"layer '0': 1 of its 8 rows are {why}, which '{variant}' cannot normalise.*exclude="
    model = nn.Sequential(broken(how))
    with pytest.raises(ValueError, match=message):
        to_enc(model, variant)
    with pytest.raises(ValueError, match=message):
        to_enc(model, variant, preserve=torch.randn(1, 3, 8, 8), post_norm=True)
    assert not list(enc_layers(model))

    enc = nn.Sequential(ENCConv2d(3, 8, 3, bias=False, variant=variant))
    with pytest.raises(RuntimeError, match=message):
        enc.load_state_dict(model.state_dict())
    enc[0].weight.data.copy_(model[0].weight)
    with pytest.raises(ValueError, match=message):
        fold(enc)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("scale", [1e-15, 1e-8, 1.0, 1e8, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_that_pass_have_the_effective_weight_of_float64(variant, scale, dtype):
    weight = torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(0)).mul(scale).to(dtype)
    assert not imprecise_rows(weight, variant).any()
    exact = literal(weight.double() / scale, variant, 1.0)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert (enc_weight(weight, variant).double() - exact).norm() < tolerance


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("offset", [10.0**k for k in range(9)])
def test_rows_that_pass_are_within_a_hundredth_however_large_their_mean(variant, offset):
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) + offset
    error = (enc_weight(weight, variant).double() - literal(weight.double(), variant, 1.0)).flatten(1)
    refused = imprecise_rows(weight, variant)
    assert (error.norm(dim=1) < 0.01)[~refused.expand(4)].all()
    assert refused.any() == (variant in ("ws", "centered_fro") and offset > 2e5)


def test_float64_holds_rows_that_float32_does_not_but_not_those_within_its_own_rounding():
    model = nn.Sequential(broken("1e-25", torch.float64))
    to_enc(model)
    assert audit(model).max_deviation < 1e-12
    with pytest.raises(ValueError, match="constant up to rounding"):
        to_enc(nn.Sequential(broken("almost constant", torch.float64)))


def test_nothing_that_folds_is_infinite():
    model = nn.Sequential(ENCConv2d(3, 8, 3, variant="fro"))
    with torch.no_grad():
        model[0].weight[2] *= 1e-25  # a dead filter is no obstacle for eq. 20
    folded = fold(copy.deepcopy(model))
    assert folded[0].weight.isfinite().all()
    torch.testing.assert_close(folded(torch.ones(1, 3, 4, 4)), model(torch.ones(1, 3, 4, 4)))
