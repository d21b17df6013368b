"""What ENC promises of any network, on a hundred architectures of torchvision, timm and mmpretrain."""

from __future__ import annotations

import pytest
from architectures.catalogue import ARCHITECTURES, SMOKE
from architectures.properties import (
    StockCannot,
    Subject,
    copies,
    export,
    fold_error,
    folded_norms,
    fx,
    groups,
    keys,
    layers,
    step,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own; those of to_enc are tested by name


@pytest.fixture(
    scope="module",
    params=[pytest.param(x, id=x.id, marks=() if x.id in SMOKE else pytest.mark.architectures) for x in ARCHITECTURES],
)
def subject(request):
    return Subject(request.param)


def test_to_enc_finds_layers(subject):
    assert int(layers(subject)) > 0


def test_a_training_step_reaches_every_enc_weight(subject):
    step(subject)


def test_folding_keeps_the_outputs(subject):
    fold_error(subject)


def test_checkpoints_load_strictly_both_ways(subject):
    keys(subject)


def test_each_parameter_is_in_one_group_with_its_decay(subject):
    groups(subject)


@pytest.mark.parametrize("ability", [copies, fx, pytest.param(export, marks=pytest.mark.architectures)])
def test_what_the_stock_network_can_the_enc_network_can(ability, subject):
    try:
        ability(subject)
    except StockCannot as reason:
        pytest.skip(f"stock cannot: {reason}")


def test_folded_norms_are_those_of_the_impulse_response(subject):
    folded_norms(subject)
