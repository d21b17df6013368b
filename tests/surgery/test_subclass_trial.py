"""Subclasses with attributes and steps of their own: kept as they are, or the layer stays plain."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from functional.test_weights import literal
from torch import nn
from torch.nn.utils import parametrize

from enc_plugin import ENCConv2d, fold, to_enc
from enc_plugin.convert import enc_layers


class Detectron(nn.Conv2d):
    """detectron2.layers.Conv2d, which many code bases have copied."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class Doubled(nn.Linear):
    """Uses the public names of ENC layers for things of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.variant, self.alpha, self.settings, self.calls = "doubled", 2.0, {"of": "its own"}, 0
        self.log_alpha = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        return F.linear(x, self.weight, self.bias) * (self.alpha if self.variant == "doubled" else 1)

    def fuse(self):
        return "its own"


class Merging(nn.Linear):
    """An adapter of low rank as in loralib: in eval mode it is a part of the weight."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down = nn.Parameter(torch.randn(2, self.in_features))
        self.up = nn.Parameter(torch.zeros(self.out_features, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        return out if self.merged else out + x @ self.down.T @ self.up.T


def with_effective_weight(layer, variant="ws"):
    layer = copy.deepcopy(layer)
    layer.weight = nn.Parameter(literal(layer.weight.detach().double(), variant, 1.0).float())
    return layer


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(6)])
@pytest.mark.parametrize("activation", [None, F.relu])
def test_a_norm_and_an_activation_inside_a_layer_keep_their_place(norm, activation):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), Detectron(4, 6, 3, norm=copy.deepcopy(norm), activation=activation)
    ).eval()
    x, names = torch.randn(2, 3, 8, 8), [name for name, _ in model.named_parameters()]
    expected = with_effective_weight(model[1])(with_effective_weight(model[0])(x))
    assert len(to_enc(model)) == 2
    torch.testing.assert_close(model(x), expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert (model[1].norm is None) == (norm is None)
    folded = fold(model)
    assert type(folded[1]) is Detectron
    torch.testing.assert_close(folded(x), expected)


def test_a_post_norm_goes_beside_the_norm_that_a_layer_has():
    torch.manual_seed(0)
    model = nn.Sequential(Detectron(3, 4, 3, norm=nn.BatchNorm2d(4))).eval()
    own = model[0].norm
    to_enc(model, post_norm=True)
    assert model[0].norm is own
    assert {name.split(".")[1] for name, _ in model.named_parameters()} == {"weight", "bias", "norm", "post_norm"}


def test_a_post_norm_is_not_put_behind_an_activation_because_it_could_not_be_folded():
    class Activated(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(Activated(4, 8), nn.Linear(8, 3))
    report = to_enc(model)
    assert [layer.name for layer in report.layers] == ["1"]
    assert "Activated does more than add its bias to W x" in report.skipped["0"]
    model = nn.Sequential(Activated(4, 8))
    assert len(to_enc(model, post_norm=False)) == 1
    assert to_enc(model, post_norm=True).skipped["0"].startswith("Activated does more")


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_merges_an_adapter_into_its_weight_stays_plain(training):
    torch.manual_seed(0)
    model = nn.Sequential(Merging(4, 8), nn.Linear(8, 3)).train(training)
    report = to_enc(model, post_norm=False)
    assert report.skipped == {"0": "Merging changes its weight in train() and eval()"}
    nn.init.normal_(model.train()[0].up)
    x = torch.randn(2, 4)
    torch.testing.assert_close(model.train()(x), model.eval()(x))


def test_a_layer_that_cannot_change_its_mode_without_its_values_stays_plain():
    class Picky(Merging):
        def train(self, mode=True):
            if not mode and self.up.any() and self.down.eq(1).all():
                raise RuntimeError("singular")
            return super().train(mode)

    report = to_enc(nn.Sequential(Picky(4, 8), nn.Linear(8, 3)), post_norm=False)
    assert report.skipped == {"0": "Picky does not run outside of the network: singular"}


def test_a_layer_with_a_parametrized_bias_stays_plain_because_fold_could_not_undo_its_class():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[0], "bias", nn.Softplus())
    assert "other than its weight is parametrized" in to_enc(model).skipped["0"]
    parametrize.register_parametrization(model[2], "bias", nn.Softplus())
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(fold(model.eval())(x), model(x))


def test_a_layer_with_complex_weights_stays_plain():
    class Spectrum(nn.Module):  # works on the spectrum of its input
        def __init__(self):
            super().__init__()
            self.real, self.complex = nn.Linear(6, 6), nn.Linear(4, 4, dtype=torch.complex64)

        def forward(self, x):
            return torch.fft.irfft(self.complex(torch.fft.rfft(self.real(x))), 6)

    model, x = Spectrum(), torch.randn(3, 6)
    report = to_enc(model, example=x)
    assert report.skipped == {"complex": "the weight of this Linear is torch.complex64, not of real numbers"}
    assert [layer.name for layer in report.layers] == ["real"]
    assert model(x).isfinite().all()


@pytest.mark.parametrize("ignores", [True, False])
def test_a_post_norm_needs_a_layer_that_adds_the_bias_which_fold_gives_it(ignores):
    class Conv(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight, None if ignores else self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Conv(3, 4, 3, bias=False), nn.Conv2d(4, 4, 1))
    report = to_enc(model, post_norm=True)
    assert len(report) == (1 if ignores else 2)
    for norm in (layer.norm for _, layer in enc_layers(model)):
        norm.running_mean.normal_()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(fold(model).eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_public_names_of_enc_layers_that_a_subclass_uses_stay_the_subclass_s():
    torch.manual_seed(0)
    model, x = nn.Sequential(Doubled(4, 3)), torch.randn(2, 4)
    own = model[0].log_alpha
    expected = with_effective_weight(model[0])(x)
    to_enc(model, post_norm=False)
    for layer in (model[0], copy.deepcopy(model)[0], pickle.loads(pickle.dumps(model))[0]):
        torch.testing.assert_close(layer(x), expected)
        assert (layer.variant, layer.alpha, layer.settings["of"]) == ("doubled", 2.0, "its own")
        assert (layer.enc_variant, layer.enc_alpha, layer.enc_log_alpha) == ("ws", 1.0, None)
        assert layer.enc_settings == {"variant": "ws", "alpha": 1.0, "post_norm": False}
    assert model[0].log_alpha is own
    assert model[0].calls == 1, "what a forward pass sets is kept"
    with pytest.raises(ValueError, match=r"Doubled\.fuse merges the weights"):
        model[0].fuse()
    folded = fold(model)[0]
    torch.testing.assert_close(folded(x), expected)
    assert (folded.variant, folded.alpha, folded.settings["of"], folded.fuse()) == (
        "doubled",
        2.0,
        "its own",
        "its own",
    )
    assert folded.__dict__.keys() == Doubled(4, 3).__dict__.keys()


def test_a_clash_that_has_no_other_name_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(5, 4), Doubled(4, 3))
    with pytest.raises(ValueError, match="layer '1': Doubled already has attributes log_alpha.*constant alpha"):
        to_enc(model, alpha="learnable", post_norm=False)
    assert not list(enc_layers(model))

    class Effective(nn.Linear):
        effective_weight = "its own"

    model = nn.Sequential(nn.Linear(5, 4), Effective(4, 3))
    assert to_enc(model).skipped == {"1": "Effective has attributes whose names ENC layers need (effective_weight)"}


def test_an_attribute_that_a_stock_layer_was_given_stays():
    conv = nn.Conv2d(3, 4, 3)
    conv.norm, conv.variant = nn.GroupNorm(2, 4), "mine"
    own = conv.norm
    to_enc(conv, "wn", post_norm=True)
    assert (conv.norm, conv.variant, conv.enc_variant) == (own, "mine", "wn")
    assert isinstance(conv.enc_norm, nn.BatchNorm2d)
    assert not isinstance(fold(conv).norm, nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["variant", "alpha", "settings", "log_alpha"])
def test_settings_cannot_be_set_behind_the_layer_s_back(name):
    with pytest.raises(AttributeError, match=f"{name}: the settings of an ENC layer are fixed"):
        setattr(ENCConv2d(3, 4, 3), name, "wn")
