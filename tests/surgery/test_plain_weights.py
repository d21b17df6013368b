"""What stays plain is named with the reason, and most of a network does not stay plain without a warning."""

from __future__ import annotations

import warnings

import pytest
import timm
from torch import nn
from torch.nn.utils import parametrizations

from enc_plugin import fold, to_enc


def test_parameters_outside_of_layers_go_by_their_own_names_and_gains_and_tokens_are_none():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=2, init_values=1e-5)
    report = to_enc(model)
    assert report.skipped == {"pos_embed": "1x5x12 parameter of VisionTransformer, not of one of its layers"}
    assert "\nplain: pos_embed (1x5x12 parameter of VisionTransformer, not of" in report.table


def test_a_network_of_layers_that_normalise_their_own_weights_is_warned_of():
    model = timm.create_model("test_nfnet", num_classes=4)
    standardized = [m for m in model.modules() if type(m).__name__ == "ScaledStdConv2d"]
    with pytest.warns(UserWarning, match=r"of NormFreeNet stay plain.*ScaledStdConv2d.*\(\d+ layers\)") as caught:
        report = to_enc(model)
    text = next(str(w.message) for w in caught if "stay plain" in str(w.message))
    assert f"{len(standardized)} of {len(standardized) + len(report)} layers" in text
    plain, enc = (sum(m.weight.numel() for m in layers) for layers in (standardized, _enc_modules(model, report)))
    assert f" {plain / (plain + enc):.0%} of their weights" in text


def _enc_modules(model, report):
    return [model.get_submodule(layer.name) for layer in report.layers]


def test_a_small_plain_part_and_one_that_was_asked_for_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), parametrizations.weight_norm(nn.Linear(8, 4)))
        assert list(to_enc(small).skipped) == ["2"]
        chosen = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 4), nn.BatchNorm1d(4))
        assert to_enc(chosen, exclude="0").skipped == {"0": "left out by include / exclude"}


def test_the_report_names_the_layers_that_folding_gives_a_bias():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 3, bias=False))
    keys = set(model.state_dict())
    report = to_enc(model)
    assert report.table.endswith("folding adds a bias, which the stock layers do not have, to: 0, 3")
    assert set(fold(model).state_dict()) - keys == {"0.bias", "3.bias"}
    assert not any(layer.adds_bias for layer in to_enc(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False))).layers)
