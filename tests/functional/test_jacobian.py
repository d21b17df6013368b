import copy
import math
import random
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmcv.cnn.bricks import drop as mmcv_drop
from mmpretrain.models.backbones.densenet import DenseBlock
from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.models.backbones.seresnet import SEBottleneck
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from enc_plugin import to_enc
from enc_plugin.functional import fgsm, gbr


class _DenseTail(nn.Module):
    """A dense block as DenseNet runs it, its list of features joined."""

    def __init__(self, channels):
        super().__init__()
        self.block = DenseBlock(2, channels, bn_size=2, growth_rate=3)

    def forward(self, x):
        return self.block(x)


def network(block, classes=4, seed=0):
    """conv, BN, ReLU, ``block``, pooling and a classifier in float64 eval mode, with statistics that say something."""
    torch.manual_seed(seed)
    bodies = {
        "plain": lambda: (nn.Conv2d(8, 8, 3, 2, 1), 8),
        "residual": lambda: (BasicBlock(8, 8), 8),
        "se": lambda: (SEBottleneck(8, 8, expansion=2, se_ratio=4), 8),
        "dense": lambda: (_DenseTail(8), 14),
    }
    body, channels = bodies[block]()
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        body,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * channels, classes),
    ).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return net.eval()


def literal(forward, inputs):
    """The definition: one Jacobian after the other, in float64."""
    norms = [torch.autograd.functional.jacobian(lambda x: forward(x)[0], x[None]).square().sum() for x in inputs]
    return torch.stack(norms)


def images(count=5, size=8):
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("enc", [False, True])
@pytest.mark.parametrize("block", ["plain", "residual", "se", "dense"])
def test_exact_gbr_is_the_norm_of_the_literal_jacobian(block, enc):
    net, x, labels = network(block), images(), torch.tensor([0, 3, 1, 2, 2])
    if enc:
        to_enc(net)
        net.eval()
    torch.testing.assert_close(gbr(net, x, batch_size=2), literal(net, x), rtol=1e-10, atol=0)
    probs = lambda x: net(x).softmax(1)  # noqa: E731
    torch.testing.assert_close(gbr(net, x, output="probs"), literal(probs, x), rtol=1e-10, atol=0)
    of_label = torch.stack(
        [literal(lambda x, k=k: probs(x)[:, k : k + 1], v[None])[0] for v, k in zip(x, labels, strict=True)]
    )
    torch.testing.assert_close(gbr(net, x, output="label_prob", labels=labels), of_label, rtol=1e-10, atol=0)


def test_float32_agrees_with_float64():
    net, x = network("residual"), images()
    exact = gbr(net, x)
    single = gbr(net.float(), x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("output", ["probs", "label_prob"])
def test_probabilities_of_confident_predictions_have_the_gbr_of_float64(output):
    torch.manual_seed(0)
    net, labels = nn.Linear(6, 3), torch.zeros(5, dtype=torch.long)
    net.bias.data[0] = 18  # 1 - p is about 1e-8, below the rounding of float32
    x = torch.randn(5, 6)
    exact = gbr(copy.deepcopy(net).double(), x.double(), output=output, labels=labels)
    torch.testing.assert_close(gbr(net, x, output=output, labels=labels).double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_gbr_of_a_linear_layer_is_its_squared_norm_with_or_without_bias(bias):
    layer = nn.Linear(7, 5, bias=bias).double()
    found = gbr(layer, torch.randn(3, 7).double())
    torch.testing.assert_close(found, layer.weight.detach().square().sum().expand(3), rtol=1e-12, atol=0)


def test_gbr_of_one_hidden_layer_by_hand():
    w1, w2 = torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])  # hidden: (3, -1), (1, 3), (-1, -3)
    # W2 diag(1, 0) W1 = [[1, 2], [2, 4]]; W2 W1 = [[4, -2], [2, 4]]; no unit is active.
    assert gbr(lambda x: (x @ w1.T).relu() @ w2.T, x).tolist() == [25, 40, 0]


@pytest.mark.parametrize("projections", [1, 2, 3])
@pytest.mark.parametrize("output", ["logits", "probs"])
def test_projections_are_unbiased(projections, output):
    net, x = network("plain"), images(4)
    exact = gbr(net, x, output=output)
    generator = torch.Generator().manual_seed(5)
    repeats = 400
    many = x.repeat(repeats, 1, 1, 1)
    draws = gbr(net, many, output=output, projections=projections, generator=generator, batch_size=400)
    draws = draws.view(repeats, len(x))
    error = (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(repeats))
    assert error.abs().max() < 4


@pytest.mark.parametrize("projections", [4, 5, 100])
def test_projections_are_exact_from_the_number_of_outputs_on(projections):
    net, x = network("residual"), images()
    assert torch.equal(gbr(net, x, projections=projections), gbr(net, x))


@given(size=st.integers(2, 12), data=st.data())
def test_one_orthonormal_probe_is_exact_where_all_directions_are_equal(size, data):
    count = data.draw(st.integers(1, size))
    rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    found = gbr(lambda x: x @ rotation, torch.randn(3, size, dtype=torch.float64), projections=count)
    torch.testing.assert_close(found, torch.full((3,), float(size), dtype=torch.float64))


def test_the_result_does_not_depend_on_the_batch_size():
    net, x = network("se"), images(7)
    draw = lambda size: gbr(net, x, projections=2, generator=torch.Generator().manual_seed(0), batch_size=size)  # noqa: E731
    for size in (1, 2, 3, 6):
        torch.testing.assert_close(draw(size), draw(7), rtol=1e-12, atol=0)


def test_a_sample_with_a_seed_has_its_probes_wherever_it_stands():
    net, x, seeds = network("plain"), images(6), torch.arange(6) * 1000
    whole = gbr(net, x, projections=1, seeds=seeds)
    order = torch.tensor([4, 1, 5])
    torch.testing.assert_close(gbr(net, x[order], projections=1, seeds=seeds[order]), whole[order], rtol=1e-12, atol=0)
    assert not torch.allclose(gbr(net, x, projections=1, seeds=seeds + 1), whole)


def test_without_a_generator_the_probes_follow_from_the_global_seed():
    net, x = network("plain"), images()
    torch.manual_seed(3)
    first = gbr(net, x, projections=1)
    torch.manual_seed(4)
    other = gbr(net, x, projections=1)
    torch.manual_seed(3)
    assert torch.equal(gbr(net, x, projections=1), first)
    assert not torch.equal(other, first)


def test_no_more_samples_than_the_batch_size_are_in_the_network_at_once():
    net, sizes = network("plain"), []
    net[0].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    gbr(net, images(50), batch_size=8)
    assert max(sizes) == 8


def test_nothing_but_the_result_changes():
    net, x = network("residual"), images()
    net[0].weight.requires_grad_(False)
    net[-1].weight.grad = torch.ones_like(net[-1].weight)
    net[3].train()  # a mode that has no batch norm of its own in train mode must survive as well
    for module in net[3].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    wants = [p.requires_grad for p in net.parameters()]
    state, copy = torch.get_rng_state(), x.clone()
    gbr(net, x, projections=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert modes == [module.training for module in net.modules()]
    assert wants == [p.requires_grad for p in net.parameters()]
    assert [p.grad is None for p in net.parameters()].count(False) == 1
    assert torch.equal(net[-1].weight.grad, torch.ones_like(net[-1].weight))
    assert torch.equal(x, copy)
    assert x.grad is None
    assert not x.requires_grad


def test_the_power_iteration_of_spectral_norm_in_train_mode_is_undone():
    net = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    before = copy.deepcopy(net.state_dict())
    gbr(net, torch.randn(2, 4))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_no_parameter_gradient_is_computed():
    net, asked = network("plain"), []
    for parameter in net.parameters():
        parameter.register_hook(lambda grad: asked.append(grad))
    found = gbr(net, images())
    assert not asked
    assert not found.requires_grad


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, torch.enable_grad, partial(torch.autocast, "cpu", torch.float16)]
)
def test_works_whatever_grad_and_autocast_modes_are_on_outside(context):
    net, x = network("plain").float(), images().float()  # autocast leaves float64 alone
    expected = gbr(net, x)
    with context():
        inside = gbr(net, x.clone())
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert torch.equal(inside, expected)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x: net(x), lambda net: partial(net.forward)])
def test_a_batch_norm_in_train_mode_is_refused_and_left_alone(wrap):
    net = network("plain")
    net[1].train()
    before = net[1].running_mean.clone()
    with pytest.raises(ValueError, match="BatchNorm2d is in train mode.*eval"):
        gbr(wrap(net), images())
    assert torch.equal(net[1].running_mean, before)
    assert net[1].num_batches_tracked == 0


def test_a_batch_norm_without_running_statistics_is_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="keeps no running statistics"):
        gbr(net, torch.randn(5, 3))


def test_active_dropout_is_refused_and_idle_dropout_is_not():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    with pytest.raises(ValueError, match="Dropout is in train mode"):
        gbr(net, torch.randn(5, 3))
    assert gbr(net.eval(), torch.randn(5, 3)).shape == (5,)


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0].mean(1)


class _OwnDropout(nn.Module):
    """Functional dropout of 1 %, by the mode of the module that calls it."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.01, self.training)


class _SkippedByPython(nn.Module):
    """A layer that is skipped for the whole batch, by Python's random numbers."""

    def forward(self, x):
        return x if self.training and random.random() < 0.5 else 2 * x


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (_Attention, (4, 8)),
        (lambda: nn.RReLU(), (5,)),
        (lambda: StochasticDepth(0.1, "batch"), (5,)),
        (lambda: DropPath(0.1), (5,)),
        (lambda: mmcv_drop.DropPath(0.1), (5,)),
        (lambda: nn.Sequential(nn.Linear(5, 3), _OwnDropout()), (5,)),
        (_SkippedByPython, (5,)),
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_a_network_that_draws_random_numbers_in_train_mode_is_refused_whatever_its_class(network, shape, count):
    net, x = network(), torch.randn(count, *shape)
    before = torch.get_rng_state(), random.getstate()
    for forward in (net, lambda x: net(x), net.forward):
        with pytest.raises(ValueError, match="forward: .* random"):
            gbr(forward, x)
    with pytest.raises(ValueError, match=r"is in train mode and draws random numbers.*model.eval\(\)"):
        gbr(net, x)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert gbr(net.eval(), x).shape == (count,)


def test_chance_that_no_mode_switches_off_is_refused_and_draws_without_effect_are_not():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="expected the same output for the same input, but it is random"):
        gbr(lambda x: nn.functional.dropout(x, 0.3), x)
    assert torch.equal(gbr(lambda x: x + 0 * torch.rand(1), x), torch.full((4,), 3.0))


def test_a_compiled_network_has_the_jacobian_of_the_network():
    net, x = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).eval(), torch.randn(3, 4)
    compiled = torch.compile(net, backend="aot_eager")
    compiled(x).sum().backward()  # compiled before
    within = nn.Sequential(compiled, nn.Tanh()).eval()
    for projections in (None, 2):
        assert torch.equal(gbr(compiled, x, projections=projections), gbr(net, x, projections=projections))
        expected = gbr(nn.Sequential(net, nn.Tanh()).eval(), x, projections=projections)
        assert torch.equal(gbr(within, x, projections=projections), expected)


class _Squeeze(nn.Module):
    def forward(self, x):
        return x.squeeze()


@pytest.mark.parametrize(
    ("forward", "shape"),
    [
        (lambda x: x.sum((2, 3)), (3, 5, 5)),
        (lambda x: x.mean(1), (3, 2, 2)),
        (lambda x: torch.stack([x, x**2], 1), ()),
        (lambda x: x**3, ()),
        (nn.Sequential(nn.Conv2d(3, 6, 5), _Squeeze()).double().eval(), (3, 5, 5)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 1), _Squeeze()).double().eval(), (3, 2, 2)),
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_sums_scalar_samples_and_networks_that_squeeze_are_valid_functions(forward, shape, count):
    x = torch.randn(count, *shape, dtype=torch.float64)
    batched = [torch.stack([sample, sample]) for sample in x]  # for the oracle: two of a kind, which no squeeze takes
    jacobians = [torch.autograd.functional.jacobian(lambda two: forward(two)[0], two) for two in batched]
    expected = torch.stack([jacobian.square().sum() for jacobian in jacobians])
    torch.testing.assert_close(gbr(forward, x, batch_size=3), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_batch_norm_on_maps_made_of_tokens_is_differentiated_alike_in_batches_of_one(count):
    # torch's own gradient of a batch of one was wrong by a factor of ten on the CPU.
    norm = nn.BatchNorm2d(16).double().eval()
    norm.running_var.uniform_(0.1, 2)
    x = torch.randn(count, 49, 16, dtype=torch.float64)

    def forward(tokens):
        return norm(tokens.transpose(1, 2).reshape(-1, 16, 7, 7)).mean((2, 3))

    expected = (1 / (norm.running_var + norm.eps) / 49).sum().expand(count)
    torch.testing.assert_close(gbr(forward, x), expected, rtol=1e-10, atol=0)
    labels = torch.zeros(count, dtype=torch.int64)
    step = fgsm(forward, x, labels, 0.5, lower=-9.0, upper=9.0) - x
    signs = -torch.eye(16, dtype=torch.float64)[0] * 2 + 1  # of the true class it goes down, of the others up
    torch.testing.assert_close(step, 0.5 * signs.expand(count, 49, 16))


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("projections", [None, 1])
@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(0),
        lambda x: x / x.norm(),
        lambda x: x.cumsum(0),
        lambda x: x.flip(0).cumsum(0).flip(0),
        lambda x: x.roll(1, 0) * x,
        lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
        lambda x: (x @ x.T).softmax(1) @ x,
    ],
)
def test_samples_that_depend_on_each_other_are_refused(mix, projections, count):
    with pytest.raises(ValueError, match="depends on other samples"):
        gbr(mix, torch.randn(count, 4), projections=projections)


def test_a_network_that_begins_in_place_or_with_a_view_works():
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(gbr(nn.ReLU(inplace=True), x), (x > 0).flatten(1).sum(1).float())
    assert torch.equal(gbr(lambda x: x.view(len(x), -1) * 2, x), torch.full((3,), 128.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_has_diverged_gives_nan_and_no_error(value):
    net = network("residual")
    with torch.no_grad():
        net[3].conv1.weight.fill_(value)
    assert not gbr(net, images()).isfinite().any()


def test_no_samples_give_no_values():
    assert gbr(nn.Linear(3, 2), torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize(
    ("forward", "options", "error", "message"),
    [
        (lambda x: x, {"output": "loss"}, ValueError, "output: expected one of 'logits'"),
        (lambda x: x, {"output": "label_prob"}, ValueError, "labels: 'label_prob' needs 4 class numbers, got None"),
        (lambda x: x, {"output": "label_prob", "labels": torch.zeros(4)}, ValueError, "labels: .*float32"),
        (lambda x: x, {"projections": 0}, ValueError, "projections: expected None"),
        (lambda x: x, {"projections": 1.5}, TypeError, "projections: expected None"),
        (lambda x: x, {"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        (lambda x: x, {"seeds": torch.zeros(3, dtype=torch.long)}, ValueError, "seeds: expected 4 integers"),
        (lambda x: (x, x), {}, TypeError, "forward: expected a callable that returns a tensor .* got tuple"),
        (torch.fft.fft, {}, TypeError, "forward: expected a callable that returns .* real numbers"),
        (lambda x: x.sum(), {}, ValueError, r"forward: expected outputs of shape \(4, C\), got \(\)"),
        (lambda x: x.detach() * 2, {}, ValueError, "does not depend on the input in a way that autograd sees"),
        (lambda x: torch.ones(4, 2, requires_grad=True), {}, ValueError, "does not depend on the input"),
    ],
)
def test_wrong_arguments_are_named(forward, options, error, message):
    with pytest.raises(error, match=message):
        gbr(forward, torch.randn(4, 3), **options)


def test_integer_inputs_are_refused():
    with pytest.raises(TypeError, match="inputs: expected floating point"):
        gbr(lambda x: x, torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2, 2), (4, 2, 3)])
def test_a_softmax_of_other_than_a_vector_of_logits_is_refused(shape):
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1)[:, : math.prod(shape[1:])].reshape(len(x), *shape[1:])

    with pytest.raises(
        ValueError, match="'probs' is a softmax over dimension 1 .*compute the probabilities in forward"
    ):
        gbr(forward, torch.randn(4, 12), output="probs")
    assert torch.equal(gbr(forward, torch.randn(4, 12)), torch.full((4,), float(math.prod(shape[1:]))))
    assert gbr(lambda x: x[:, :3, None, None], torch.randn(4, 12), output="probs").shape == (4,)


@pytest.mark.parametrize("output", ["probs", "label_prob"])
def test_the_softmax_of_probabilities_is_refused(output):
    weight, inputs = torch.randn(6, 4), torch.randn(3, 6)
    given = dict(output=output, labels=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="which are probabilities already .* leave the softmax out of forward"):
        gbr(lambda x: (x @ weight).softmax(1), inputs, **given)
    assert gbr(lambda x: (x @ weight).log_softmax(1), inputs, **given).isfinite().all()
    torch.testing.assert_close(
        gbr(lambda x: (x @ weight).softmax(1), inputs), gbr(lambda x: x @ weight, inputs, output="probs")
    )
