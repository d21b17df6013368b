"""ENC layers whose weight torch.nn.utils replaces: pruned ones, parametrized ones, spectral and weight norm."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from functional.test_weights import ALL, literal
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from enc_plugin import ENCConv2d, ENCLinear, add_shift, audit, fold, param_groups_enc, to_enc
from enc_plugin.functional import enc_weight


def network(variant="ws", **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    to_enc(model, variant, **kwargs)
    return model.eval()


def of_kept(weight, kept, variant, alpha=1.0):
    """Eq. 20-23 of the elements that a mask keeps, row by row in float64."""
    weight, kept = weight.detach().double().flatten(1), kept.bool().flatten(1)
    shape = weight.shape
    if variant in ("fro", "centered_fro"):
        weight, kept = weight.reshape(1, -1), kept.reshape(1, -1)
    out = torch.zeros_like(weight)
    rows = [j for j in range(len(weight)) if kept[j].any()]
    for j in rows:
        out[j, kept[j]] = literal(weight[j][kept[j]][None], variant, alpha / len(rows))[0]
    return out.view(shape)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("alpha", [2.0, "learnable"])
def test_a_pruned_layer_keeps_its_zeros_its_norm_and_the_equation_of_what_is_left(variant, alpha):
    model = network(variant, alpha=alpha)
    layer, x = model[0], torch.randn(2, 3, 8, 8)
    prune.l1_unstructured(layer, "weight", 0.4)
    prune.ln_structured(layer, "weight", 0.25, n=2, dim=0)  # and two whole rows
    what = layer.effective_weight
    expected = of_kept(layer.weight_orig, layer.weight_mask, variant, 1.0 if alpha == "learnable" else alpha)
    torch.testing.assert_close(what.detach().double().flatten(1), expected, atol=1e-6, rtol=0)
    assert audit(model).max_deviation < 1e-5
    row = audit(model, folded=True, inputs=x)[0]
    assert row.sq_norm == pytest.approx(expected.square().sum().item() / (1 + model[1].eps), rel=1e-5)

    model(x).square().sum().backward()
    grad = layer.weight_orig.grad
    assert grad.isfinite().all()
    assert not grad[layer.weight_mask == 0].any()
    assert grad[layer.weight_mask == 1].any()

    with torch.no_grad():  # as a step of the optimizer does
        layer.weight_orig.add_(torch.randn_like(layer.weight_orig))
    expected = of_kept(layer.weight_orig, layer.weight_mask, variant, 1.0 if alpha == "learnable" else alpha)
    torch.testing.assert_close(layer.effective_weight.double().flatten(1), expected, atol=1e-6, rtol=0)

    folded = fold(model)
    assert set(folded.state_dict()) == set(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()) | {
        "4.weight",
        "4.bias",
    }
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert (folded[0].weight == 0).equal(layer.weight_mask == 0)


def test_a_pruned_layer_is_audited_and_checked_by_what_is_trained_and_not_by_the_weight_of_its_last_forward_pass():
    model = network()
    layer = prune.l1_unstructured(model[0], "weight", 0.4)
    with torch.no_grad():
        layer.weight_orig.mul_(10)
    assert audit(model)[0].free_norm == pytest.approx((layer.weight_orig * layer.weight_mask).norm().item(), rel=1e-6)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["0.weight_orig"].fill_(torch.nan)
    with pytest.raises(RuntimeError, match="layer '0': its weight holds NaN"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="layer '0': its weight holds NaN"):
        fold(model)


def test_the_gradient_of_a_pruned_weight_is_that_of_finite_differences():
    torch.manual_seed(0)
    kept = (torch.rand(4, 9) > 0.2).double()
    kept[1] = 0
    for variant in ALL:
        weight = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda w, v=variant: enc_weight(w, v, 2.0, kept), weight)


def test_a_pruned_subclass_uses_the_mask_too():
    class Conv(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight, self.bias)

    model = nn.Sequential(Conv(3, 8, 3))
    to_enc(model)
    prune.l1_unstructured(model[0], "weight", 0.5)
    x = torch.randn(1, 3, 6, 6)
    stock = nn.Conv2d(3, 8, 3)
    stock.weight.data.copy_(model[0].effective_weight)
    stock.bias.data.copy_(model[0].bias)
    torch.testing.assert_close(model(x), stock(x))
    assert (fold(model)[0].weight == 0).float().mean() == 0.5


@pytest.mark.parametrize(("variant", "keep"), [("ws", 2), ("wn", 1)])
def test_a_mask_that_leaves_signs_alone_is_refused_with_the_way_out(variant, keep):
    model = nn.Sequential(ENCLinear(9, 4, variant=variant))
    mask = torch.ones(4, 9)
    mask[1, keep:] = 0
    prune.custom_from_mask(model[0], "weight", mask)
    with pytest.raises(ValueError, match="layer '0': its pruning mask leaves 1 of 4 rows fewer than .*fill_"):
        fold(model)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("structured", [False, True])
def test_pruning_is_made_permanent_by_fold_where_the_layer_would_normalise_the_zeros(variant, structured):
    model = network(variant)
    layer, x = model[0], torch.randn(2, 3, 8, 8)
    if structured:
        prune.ln_structured(layer, "weight", 0.25, n=2, dim=0)
    else:
        prune.l1_unstructured(layer, "weight", 0.4)
    expected, state = model.eval()(x), {key: value.clone() for key, value in model.state_dict().items()}
    if variant == "fro" or (variant == "wn" and not structured):  # zeros stay zeros
        prune.remove(layer, "weight")
        torch.testing.assert_close(model(x), expected)
        return
    with pytest.raises(ValueError, match="normalise zeros of pruned weights.*fold"):
        prune.remove(layer, "weight")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(fold(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_pruned_plain_layer_stays_plain_with_the_way_out():
    model = nn.Sequential(prune.l1_unstructured(nn.Conv2d(3, 8, 3), "weight", 0.5), nn.Conv2d(8, 4, 1))
    assert "is pruned; convert the layer first and prune it afterwards" in to_enc(model).skipped["0"]


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def quietly(function, layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(layer)


REPARAMETRIZED = {
    "pruned": (lambda x: prune.l1_unstructured(x, "weight", 0.1), "weight_orig"),
    "parametrized": (
        lambda x: parametrize.register_parametrization(x, "weight", Symmetric()),
        "parametrizations.weight.original",
    ),
    "weight norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "old weight norm": (lambda x: quietly(weight_norm, x), "weight_v"),
    "old spectral norm": (lambda x: quietly(spectral_norm, x), "weight_orig"),
}


@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_what_the_optimizer_owns_in_the_place_of_the_weight_has_the_shifted_decay(name):
    change, owned = REPARAMETRIZED[name]
    layer = ENCLinear(6, 6)
    change(layer)
    layer(torch.randn(2, 6))
    names = {id(p): key for key, p in layer.named_parameters()}
    shifted = [names[id(p)] for group in param_groups_enc(layer) if "shift_eps" in group for p in group["params"]]
    assert shifted == [owned]


@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_a_reparametrized_layer_folds_to_the_plain_one_and_goes_on_working(name):
    change, _ = REPARAMETRIZED[name]
    torch.manual_seed(0)
    model = nn.Sequential(ENCLinear(6, 6, post_norm=True))
    change(model[0])
    optimizer = torch.optim.SGD(param_groups_enc(model), lr=0.1)
    add_shift(optimizer)
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    x = torch.randn(3, 6)
    before = model.eval()(x)
    folded = fold(model)
    assert type(folded[0]) is nn.Linear
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(folded(x), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(folded)(x), folded(x))
    assert torch.equal(model(x), before), "the original works as before"


def test_a_weight_of_unknown_making_is_refused_by_fold():
    layer = ENCConv2d(3, 4, 3)
    weight = layer.weight
    del layer.weight
    layer.register_parameter("mine", weight)
    layer.register_forward_pre_hook(lambda module, args: setattr(module, "weight", 2 * module.mine))
    layer(torch.randn(1, 3, 5, 5))
    with pytest.raises(ValueError, match="the weight of this ENCConv2d is not a parameter.*before you fold"):
        fold(layer)
