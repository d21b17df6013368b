"""to_enc after the optimizer, or after a wrapper for distributed training."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from enc_plugin import param_groups_enc, to_enc
from enc_plugin.convert import enc_layers


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def step(model, *optimizers):
    """Train once; the texts of what was warned of."""
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for optimizer in optimizers:
            optimizer.step()
    return [str(w.message) for w in said]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_an_optimizer_from_before_is_warned_of_at_its_first_step_with_the_names():
    model = network()
    optimizer = sgd(model.parameters())
    to_enc(model, alpha="learnable")
    (text,) = step(model, optimizer)
    assert "no optimizer holds 4 of these: '0.log_alpha', '4.log_alpha', '4.norm.weight', '4.norm.bias'." in text
    assert "Create the optimizer after to_enc" in text
    assert step(model, optimizer) == []


def test_parameters_that_were_listed_before_are_warned_of_too():
    model = network()
    parameters = list(model.parameters())
    to_enc(model)
    assert "'4.norm.weight', '4.norm.bias'" in step(model, sgd(parameters))[0]


@pytest.mark.parametrize("make", [lambda m: sgd(m.parameters()), lambda m: torch.optim.AdamW(param_groups_enc(m))])
def test_an_optimizer_made_afterwards_is_not_warned_of(make):
    model = network()
    old = sgd(model.parameters())
    to_enc(model)
    assert step(model, make(model)) == []
    del old


def test_parameters_in_another_optimizer_or_added_to_the_first_are_trained():
    model = network()
    first = sgd(list(model.parameters()))
    to_enc(model)
    second = sgd(model[4].norm.parameters())
    assert step(model, first, second) == []

    model = network()
    first = sgd(list(model.parameters()))
    to_enc(model)
    first.add_param_group({"params": list(model[4].norm.parameters())})
    assert step(model, first) == []


def test_frozen_norms_and_layers_that_nobody_trains_are_not_warned_of():
    model = network()
    optimizer = sgd(list(model.parameters()))
    to_enc(model)
    model[4].norm.requires_grad_(False)
    assert step(model, optimizer) == []

    model = network()
    optimizer = sgd(list(model[:2].parameters()))
    to_enc(model)
    assert step(model, optimizer) == []  # the linear layer is left out, not only its norm
    optimizer.add_param_group({"params": [model[4].weight]})
    assert "'4.norm.weight'" in step(model, optimizer)[0]


def test_copies_train_without_a_warning_and_the_watch_ends():
    model = network()
    to_enc(model)
    twin = copy.deepcopy(model)
    assert step(twin, sgd(twin.parameters())) == []
    assert step(model, sgd(model.parameters())) == []


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("which", ["the wrapper", "the network", "a part", "around"])
@pytest.mark.parametrize("alpha", [1.0, "learnable"])
def test_a_wrapped_model_that_would_get_parameters_is_refused_and_left_alone(which, alpha):
    model = network()
    if which == "a part":
        model[0] = DistributedDataParallel(model[0])
        given = model
    elif which == "around":
        wrapper, given = DistributedDataParallel(model), nn.ModuleList([model])
    else:
        wrapper = DistributedDataParallel(model)
        given = wrapper if which == "the wrapper" else model
    with pytest.raises(ValueError, match="it is already wrapped by DistributedDataParallel.*call to_enc first"):
        to_enc(given, alpha=alpha)
    assert not list(enc_layers(given))
    del model, given
    if which != "a part":
        del wrapper


@pytest.mark.usefixtures("process_group")
def test_a_wrapped_model_that_gets_no_parameters_is_converted():
    model = DistributedDataParallel(network())
    assert len(to_enc(model, post_norm=False)) == 2
    assert len(to_enc(network())) == 2, "another model is not concerned"
