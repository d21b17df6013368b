"""Running statistics of ENC networks fit from the first step on, and training does not notice."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from enc_plugin import fold, to_enc
from enc_plugin.functional import gbr
from enc_plugin.surgery.startup_average import average_from_start, unfit_statistics

BATCHES = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(14)]
MOMENTUM = 0.2  # an average over five batches


def network(enc: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(channels, momentum=MOMENTUM) for channels in (4, 5)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 5, 3), norms[1], nn.Flatten(1))
    if enc:
        to_enc(model)
    return model


def train(model: nn.Module, batches=BATCHES, lr: float = 0.1, call=None) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        (call or model)(x).tanh().mean().backward()
        optimizer.step()
    return model


def batch_statistics(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = copy.deepcopy(layer).double()(x.double())
    return out.mean((0, 2, 3)).detach(), out.var((0, 2, 3)).detach()


def without_averages(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


def test_statistics_are_means_over_the_first_batches_and_then_exponential():
    model = network()
    mean, var = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for n, x in enumerate(BATCHES, 1):
        model(x)
        factor = max(MOMENTUM, 1 / n)
        new_mean, new_var = batch_statistics(model[0], x)
        mean, var = mean + factor * (new_mean - mean), var + factor * (new_var - var)
        torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model[1].running_var.double(), var, rtol=1e-5, atol=0)
    assert model[1].num_batches_tracked == len(BATCHES)
    parts = list(model.modules())[1:]  # the network itself has the hooks of packed weights
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in parts)


def test_variances_near_the_smallest_of_float32_keep_their_digits():
    norm = nn.BatchNorm2d(3)
    average_from_start(norm)
    for x in BATCHES[:3]:
        norm(1e-15 * x)
    expected = torch.stack([(1e-15 * x).double().var((0, 2, 3)) for x in BATCHES[:3]]).mean(0)
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-5, atol=0)


def test_weights_train_as_without_bit_by_bit():
    averaged, stock = train(network()), train(without_averages(network()))
    for (name, a), b in zip(averaged.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(averaged[4].running_var, stock[4].running_var)


def test_a_few_steps_from_the_start_gbr_is_that_of_statistics_taken_anew():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4)
    to_enc(model, "wn")
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    anew = copy.deepcopy(model)
    for norm in anew.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    with torch.no_grad():
        anew(x)
    values = [gbr(net.eval(), x[:2], projections=1, seeds=torch.arange(2)).mean() for net in (model, anew)]
    torch.testing.assert_close(*values, rtol=1e-3, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_and_resumed_runs_go_on_with_the_average(steps, copied):
    model = train(network(), BATCHES[:steps], lr=0)
    twin = copied(model)
    resumed = network()
    train(resumed, lr=0)  # as a search for a learning rate does, before it puts the first weights back
    resumed.load_state_dict(model.state_dict())
    for other in (model, twin, resumed):
        train(other, BATCHES[steps:], lr=0)
    assert_same(model, twin)
    assert_same(model, resumed)


def test_loaded_statistics_are_not_thrown_away():
    seen = train(without_averages(network()), lr=0).state_dict()
    stock = without_averages(network())
    stock.load_state_dict(seen)
    counted = network()
    counted.load_state_dict(seen)
    for model in (stock, counted):
        train(model, lr=0)
    assert_same(stock, counted)

    uncounted = network()  # as files of torch < 0.4.1 are, and of other frameworks
    uncounted.load_state_dict(seen | {key: torch.tensor(0) for key in seen if key.endswith("num_batches_tracked")})
    train(uncounted, lr=0)
    assert torch.equal(uncounted[1].running_var, stock[1].running_var)


def test_a_count_that_is_loaded_without_its_statistics_starts_anew():
    """As from a checkpoint of another number of classes: of a norm, the count alone has the same shape."""
    norm, x = nn.BatchNorm2d(3), 1e-2 * BATCHES[0]
    average_from_start(norm)
    norm.load_state_dict({"num_batches_tracked": torch.tensor(1000)}, strict=False)
    norm(x)
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)))
    assert norm.num_batches_tracked == 1


def test_preserved_post_norms_keep_their_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    to_enc(model, "wn", preserve=torch.randn(8, 6))
    stock = without_averages(copy.deepcopy(model))
    for net in (model, stock):
        net(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(model[0].norm.running_var, stock[0].norm.running_var)


def test_synchronised_batch_norms_put_in_the_place_are_averaged_too():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert isinstance(converted[1], nn.SyncBatchNorm)
    assert_same(train(converted, lr=0), train(network(), lr=0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_averages_the_same_batches(reentrant):
    """Each batch updates twice, and the second forward pass may end in the middle of a batch norm."""
    model = network()
    body = nn.Sequential(*model[:5])
    for x in BATCHES[:2]:
        checkpoint(body, x.clone().requires_grad_(), use_reentrant=reentrant).mean().backward()
    expected = torch.stack([batch_statistics(model[0], x)[1] for x in BATCHES[:2]]).mean(0)
    torch.testing.assert_close(model[1].running_var.double(), expected, rtol=1e-5, atol=0)
    assert model[1].num_batches_tracked == 4


def test_a_layer_that_runs_twice_a_step_averages_both():
    norm = nn.BatchNorm2d(3)
    average_from_start(norm)
    (norm(BATCHES[0]) + norm(BATCHES[1])).sum().backward()
    expected = torch.stack([x.var((0, 2, 3)) for x in BATCHES[:2]]).mean(0)
    torch.testing.assert_close(norm.running_var, expected)


def test_ensembles_by_vmap_train_with_torchs_rule():
    base = network()
    params, buffers = stack_module_state([network(), network()])
    call = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))
    outputs = call(params, buffers, torch.stack(BATCHES[:2]))
    (gradient,) = torch.autograd.grad(outputs.square().sum(), [params["0.weight"]])
    for i, x in enumerate(BATCHES[:2]):
        alone = without_averages(network())
        out = alone(x)
        out.square().sum().backward()
        torch.testing.assert_close(outputs[i], out)
        torch.testing.assert_close(gradient[i], alone[0].weight.grad, rtol=1e-3, atol=1e-4)
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer)


def test_a_batch_that_is_refused_leaves_the_statistics():
    norm = nn.BatchNorm2d(3)
    average_from_start(norm)
    for batches in ([], BATCHES[:1]):
        for x in batches:
            norm(x)
        before = copy.deepcopy(norm.state_dict())
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm(torch.ones(1, 3, 1, 1))
        assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize(
    "options", [dict(momentum=None), dict(momentum=0.0), dict(momentum=1.0), dict(track_running_stats=False)], ids=str
)
def test_other_settings_of_batch_norm_are_as_in_torch(options):
    own, stock = nn.BatchNorm2d(3, **options), nn.BatchNorm2d(3, **options)
    average_from_start(own)
    for x in BATCHES[:3]:
        own(x)
        stock(x)
    for key, value in stock.state_dict().items():
        torch.testing.assert_close(own.state_dict()[key], value, rtol=1e-6, atol=1e-7)


def test_a_frozen_batch_norm_keeps_its_statistics():
    model = network()
    model[1].eval()
    train(model, lr=0)
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_var, torch.ones(4))


def test_compiled_training_is_compiled_once():
    torch.compiler.reset()
    compiled, eager = network(), network()
    frames = CompileCounterWithBackend("aot_eager")
    train(compiled, lr=0, call=torch.compile(compiled, backend=frames, fullgraph=True))
    train(eager, lr=0)
    assert frames.frame_count == 1
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, rtol=1e-5, atol=1e-6)


class _Biased(nn.BatchNorm2d):
    """Takes the biased variance, as other frameworks do."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(x.mean((0, 2, 3)), self.momentum)
                self.running_var.lerp_(x.var((0, 2, 3), unbiased=False), self.momentum)
        return x


def test_norms_are_known_by_how_they_update_and_others_are_reported():
    own, timms = _Biased(3), timm.layers.BatchNormAct2d(3)
    state = torch.get_rng_state()
    for norm in (own, timms):
        average_from_start(norm)
        assert unfit_statistics(norm) == {"": "no batch seen"}
        norm(1e-2 * BATCHES[0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(timms.running_var, (1e-2 * BATCHES[0]).var((0, 2, 3)))
    assert own.running_var.min() > 0.9
    assert unfit_statistics(timms) == {}
    assert unfit_statistics(own) == {"": "1 batches seen, the initial variance still matters"}
    for x in BATCHES * 10:
        own(x)
    assert unfit_statistics(own) == {}


def test_a_folded_network_carries_no_hooks():
    model = fold(train(network(), BATCHES[:2]))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_post_hooks
    assert b"enc_plugin" not in pickle.dumps(model)
