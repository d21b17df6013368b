"""The recorded forward pass: what it says about a network, and that the network does not notice."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from enc_plugin import ENCConv2d, to_enc
from enc_plugin.surgery.recording import RecordError, record_forward


class Reads(nn.Module):
    """A convolution that is called, and whose weight ``how`` reads besides."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.other, self.how = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), [how]

    def forward(self, x):
        return self.other(self.conv(x)) + self.how[0](self.conv, x)


def conv(x, weight):
    return F.conv2d(x, weight, padding=1)


READS = {
    "the parameter": lambda layer, x: conv(x, layer.weight),
    "a detached view": lambda layer, x: conv(x, layer.weight.detach()),
    "its data": lambda layer, x: conv(x, layer.weight.data),
    "a flattened transpose": lambda layer, x: (x.flatten(2).transpose(1, 2) @ layer.weight.flatten(1).t()[:3]).sum(),
    "a cast copy": lambda layer, x: conv(x.double(), layer.weight.to(torch.float64).clone()).float(),
    "its norm": lambda layer, x: layer.weight.norm(),
    "getattr": lambda layer, x: getattr(layer, "wei" + "ght").sum(),
}
METADATA = {
    "dtype": lambda layer, x: x.to(layer.weight.dtype).to(layer.weight.device),
    "shape": lambda layer, x: x.new_zeros(layer.weight.shape).sum() + layer.weight.numel() + layer.weight.ndim,
    "zeros_like": lambda layer, x: torch.zeros_like(layer.weight).sum(),
    "new_ones": lambda layer, x: layer.weight.new_ones(3, 1, 1),
    "an unused view": lambda layer, x: (layer.weight.flatten(1).t(), x)[1],
    "the bias": lambda layer, x: x + layer.bias[:, None, None],
    "a second call": lambda layer, x: layer(x),
    "forward without hooks": lambda layer, x: layer.forward(x),
}


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("example", [None, torch.ones(1, 3, 5, 5)], ids=["made up", "given"])
def test_a_weight_that_something_else_computes_with_has_a_reader(how, example):
    model = Reads(READS[how])
    trace = record_forward(model, example)
    assert trace.readers(model.conv) == [model]
    assert trace.readers(model.other) == []


@pytest.mark.parametrize("how", METADATA)
def test_asking_for_more_than_values_is_no_reader(how):
    model = Reads(METADATA[how])
    assert record_forward(model).readers(model.conv) == []


def test_the_reader_is_the_module_that_reads():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.inner = nn.ModuleList([nn.Linear(4, 4)]), Inner()

        def forward(self, x):
            return self.inner(x, self.layers)

    class Inner(nn.Module):
        def forward(self, x, layers):
            for layer in layers:
                x = F.linear(x, layer.weight)
            return x

    model = Outer()
    trace = record_forward(model, torch.ones(2, 4))
    assert trace.readers(model.layers[0]) == [model.inner]
    assert model.layers[0] not in trace.calls


def test_layers_that_share_a_weight_do_not_read_it_from_each_other_but_an_embedding_does():
    twins = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twins[1].weight = twins[0].weight
    assert record_forward(twins).readers(twins[0]) == []

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.decode = nn.Embedding(7, 4), nn.Linear(4, 7)
            self.decode.weight = self.embed.weight

        def forward(self, tokens):
            return self.decode(self.embed(tokens))

    model = Tied()
    assert record_forward(model).readers(model.decode) == [model.embed]


def test_torch_s_attention_and_its_fast_path_read_their_layers():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    trace = record_forward(nn.Sequential(block), torch.randn(2, 3, 8))
    assert trace.readers(block.linear1) == trace.readers(block.linear2) == [block]
    attention = nn.MultiheadAttention(8, 2)
    assert record_forward(attention).readers(attention.out_proj) == [attention]


class Followed(nn.Module):
    """A network and an average of it (a momentum encoder), which ``how`` updates in each forward pass."""

    def __init__(self, how, layer=nn.Conv2d, average=nn.Conv2d):
        super().__init__()
        self.query, self.key, self.how = layer(3, 4, 3), average(3, 4, 3).requires_grad_(False), [how]

    def forward(self, x):
        with torch.no_grad():
            self.how[0](list(self.key.parameters()), list(self.query.parameters()))
        return self.query(x) - self.key(x)


def assign(average, own):
    for a, p in zip(average, own, strict=True):
        a.data = 0.9 * a.data + 0.1 * p.data


UPDATES = {
    "copies": lambda average, own: [a.data.copy_(p.data) for a, p in zip(average, own, strict=True)],
    "lerp": lambda average, own: [a.data.lerp_(p.data, 0.1) for a, p in zip(average, own, strict=True)],
    "difference": lambda average, own: [a.data.add_(p - a, alpha=0.1) for a, p in zip(average, own, strict=True)],
    "two steps": lambda average, own: [a.mul_(0.9).add_(0.1 * p) for a, p in zip(average, own, strict=True)],
    "all at once": lambda average, own: torch._foreach_lerp_(average, own, 0.1),
    "assigned": assign,
}


@pytest.mark.parametrize("how", UPDATES)
@pytest.mark.parametrize("example", [None, torch.ones(1, 3, 5, 5)], ids=["made up", "given"])
def test_an_average_that_follows_a_weight_in_the_pass_is_no_reader_unless_one_of_the_two_alone_is_enc(how, example):
    model = Followed(UPDATES[how])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace = record_forward(model, example)
    assert trace.readers(model.query) == trace.readers(model.key) == []
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    model = Followed(UPDATES[how], ENCConv2d, ENCConv2d)
    assert record_forward(model, example).readers(model.query) == []
    model = Followed(UPDATES[how], ENCConv2d)
    assert record_forward(model, example).readers(model.query) == [model]


class Restless(nn.Module):
    """Changes everything that a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.norm = nn.Conv2d(3, 4, 3), nn.Dropout(), nn.BatchNorm2d(4, momentum=None)
        self.register_buffer("count", torch.zeros(2))
        self.cache, self.seen, self.last = {}, [], None

    def forward(self, x):
        x = self.norm(self.drop(self.conv(x))) * torch.rand(()) * random.random() * np.random.rand()
        self.count.add_(1)
        self.count[0] = x.mean()
        self.cache["x"], self.last, self.step = x, x, self.count.sum()
        self.seen.append(x)
        return x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("example", [None, torch.ones(2, 3, 5, 5)], ids=["made up", "given"])
def test_the_network_and_the_random_states_do_not_notice(training, example):
    model = Restless().train()
    model.norm.eval()
    calls = []
    model.conv.register_forward_hook(lambda *_: calls.append(1))
    model.conv.register_forward_pre_hook(lambda *_: calls.append(1))
    state, attributes = copy.deepcopy(model.state_dict()), {m: dict(m.__dict__) for m in model.modules()}
    random_states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    trace = record_forward(model, example, training=training)
    assert model.conv in trace.calls
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for module, before in attributes.items():
        assert module.__dict__.keys() == before.keys()
        assert all(module.__dict__[key] is value for key, value in before.items())
    assert (model.training, model.norm.training, calls, model.cache, model.seen) == (True, False, [], {}, [])
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(after[0], random_states[0])
    assert after[1:] == random_states[1:]


@pytest.mark.parametrize("training", [False, True])
def test_a_network_whose_course_depends_on_values_is_run_for_real_and_gets_its_buffers_back(training):
    class Choosy(Restless):
        def forward(self, x):
            if x.abs().mean() > 0:
                x = super().forward(x)
            return x

    model = Choosy()
    state = copy.deepcopy(model.state_dict())
    assert model.conv in record_forward(model, training=training).calls
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_failed_pass_leaves_nothing_behind_either():
    model = Restless()
    before = {m: dict(m.__dict__) for m in model.modules()}
    with pytest.raises(
        RecordError, match=r"Restless does not run on the example of shape \(2, 9, 5, 5\) .*pass an input batch"
    ):
        record_forward(model, torch.ones(2, 9, 5, 5))
    assert all(module.__dict__ == attributes for module, attributes in before.items())


@pytest.mark.parametrize(
    ("make", "outputs"),
    [
        (lambda: timm.create_model("resnet18", num_classes=3, channels=(4, 4, 4, 4), features_only=True), 5),
        (lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None), 1),
        (lambda: torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3)), backend="eager"), 1),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)).half(), 1),
        (lambda: nn.DataParallel(nn.Conv1d(3, 4, 3)), 1),
        (lambda: nn.Bilinear(3, 3, 2) and nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 4)), 3),
    ],
    ids=["features_only", "a dict of outputs", "compiled", "half precision", "DataParallel", "tokens"],
)
def test_many_kinds_of_networks_run_on_a_made_up_input(make, outputs):
    assert len(record_forward(make()).outputs) == outputs


def test_networks_on_the_meta_device_are_recorded():
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    assert len(record_forward(model).calls) == len(list(model.modules()))


def test_an_example_may_be_arguments_by_position_or_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(3, 2)

        def forward(self, x, *, y):
            return self.a(x) + self.b(y)

    model = Two()
    x, y = torch.ones(1, 4), torch.ones(1, 3)
    assert model.b in record_forward(model, dict(x=x, y=y)).calls
    pair = nn.Bilinear(4, 3, 2)
    assert record_forward(pair, (x, y)).outputs[0].shape == (1, 2)
    with pytest.raises(RecordError, match="does not run on a generated input"):
        record_forward(model)
    with pytest.raises(
        RecordError, match="no input can be generated for ReLU, because no layer implies the input's shape"
    ):
        record_forward(nn.ReLU())


def test_enc_layers_are_looked_at_like_plain_ones():
    model = Reads(READS["the parameter"])
    to_enc(model, "wn", exclude="conv", post_norm=True)
    trace = record_forward(model)
    assert trace.readers(model.other) == []
    assert type(model.other).__name__ == "ENCConv2d"
