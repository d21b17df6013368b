"""What a recorded pass says about scales: which norm undoes them, and which batch norm folds into a layer."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import NEW_TIMM
from torch import nn
from torch.nn import functional as F

from enc_plugin.surgery.recording import record_forward
from enc_plugin.surgery.scale_fate import fate
from enc_plugin.surgery.scale_paths import norms_that_fold


class Net(nn.Module):
    """``then(x, net)`` behind a convolution without a bias; a second convolution and some norms are at hand."""

    def __init__(self, then):
        super().__init__()
        self.conv, self.second = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.biased = nn.Conv2d(4, 4, 1)
        self.norm, self.table = nn.BatchNorm2d(4), nn.Parameter(torch.randn(1, 4, 1, 1))
        self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)
        self.then = [then]

    def forward(self, x):
        return self.then[0](self.conv(x), self)


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def by_hand(x):
    return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()


UNDONE = {
    "batch norm": lambda x, net: net.norm(x),
    "batch norm used as a function": lambda x, net: F.batch_norm(
        x, net.norm.running_mean, net.norm.running_var, training=net.training
    ),
    "group norm": lambda x, net: net.group(x),
    "instance norm": lambda x, net: net.instance(x),
    "layer norm of the last dimension": lambda x, net: F.layer_norm(x.permute(0, 2, 3, 1), (4,)),
    "ReLU and pooling": lambda x, net: net.norm(F.max_pool2d(F.relu(x), 2)),
    "in place": lambda x, net: net.norm(F.leaky_relu_(x)),
    "concatenation": lambda x, net: net.norm(torch.cat([x[:, :2], F.avg_pool2d(x, 3, 1, 1)[:, 2:]], 1)),
    "a residual sum": lambda x, net: net.norm(x + net.norm(x)),
    "a layer without a bias": lambda x, net: net.norm(net.second(F.relu(x))),
    "a gain": lambda x, net: net.norm(x * net.table),
    "RMS norm by hand": lambda x, net: rms(x),
    "layer norm by hand": lambda x, net: by_hand(x),
    "L2 normalisation": lambda x, net: F.normalize(x.flatten(1)),
    "cosine attention": lambda x, net: (F.normalize(x.flatten(2), dim=1).mT @ F.normalize(x.flatten(2), dim=1)).softmax(
        -1
    ),
}
KEPT = {
    "the end of the network": lambda x, net: x,
    "another layer": lambda x, net: net.norm(net.biased(x)),
    "a sigmoid": lambda x, net: net.norm(x.sigmoid()),
    "GELU": lambda x, net: net.norm(F.gelu(x)),
    "a constant that is added": lambda x, net: net.norm(x + net.table),
    "one of two paths": lambda x, net: net.norm(x).mean() + x.mean(),
    "a frozen affine map": lambda x, net: x * net.norm.running_var.view(1, 4, 1, 1) + net.table,
    "a softmax": lambda x, net: x.softmax(1),
    "a product with itself": lambda x, net: x * x,
}


@pytest.mark.parametrize("then", UNDONE)
def test_a_norm_undoes_a_scale_through_homogeneous_operations(then):
    net = Net(UNDONE[then])
    found = fate(record_forward(net), net.conv)
    assert found.undone, found
    x = torch.randn(2, 3, 7, 7)
    net.train()
    before = net(x)
    net.conv.weight.data *= 64  # eps counts for less
    torch.testing.assert_close(net(x), before, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("then", KEPT)
def test_a_scale_that_reaches_something_else_is_not_undone(then):
    net = Net(KEPT[then])
    assert not fate(record_forward(net), net.conv).undone


def test_a_layer_that_will_have_a_norm_of_its_own_undoes_what_reaches_it():
    net = Net(KEPT["another layer"])
    assert fate(record_forward(net), net.conv, norms_due={net.biased}).undone


def test_layers_of_known_networks_reach_their_norms():
    # DenseNet through concatenation and pooling, a pre-activation ResNet through sums, Xception through its pairs.
    for name in ("densenet121", *(["resnetv2_50"] if NEW_TIMM else []), "legacy_xception"):
        with torch.device("meta"):
            model = timm.create_model(name)
        trace = record_forward(model)
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        kept = [layer for layer in layers if not fate(trace, layer).undone]
        assert kept == [model.get_classifier()], name


def test_a_batch_norm_folds_through_views_but_not_through_anything_else():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 6) for _ in range(4))
            self.na, self.nb, self.nc, self.nd = (nn.BatchNorm1d(6) for _ in range(4))

        def forward(self, x):  # (N, T, 4)
            a = self.na(self.a(x).flatten(0, 1))
            b = self.nb(self.b(x).transpose(1, 2))
            c = self.nc(F.relu(self.c(x)).flatten(0, 1))
            d = self.d(x).flatten(0, 1)
            return a, b, c, self.nd(d) + d

    model = Heads()
    trace = record_forward(model)
    found = [norms_that_fold(trace, layer) for layer in (model.a, model.b, model.c, model.d)]
    assert found == [[model.na], [model.nb], [], []]


def test_channels_in_another_order_do_not_fold():
    class Flipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x).flip(1))

    model = Flipped()
    assert norms_that_fold(record_forward(model), model.conv) == []
