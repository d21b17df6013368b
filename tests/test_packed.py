"""The weights of a whole network at once: the same training, and in no case a weight that is out of date."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from functional.test_grouped import Operations
from functional.test_weights import ALL
from helpers import TORCH
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import enc_plugin.packed
from enc_plugin import add_shift, fold, param_groups_enc, to_enc
from enc_plugin.packed import pack_weights

pytestmark = pytest.mark.skipif(TORCH < (2, 8), reason="layers compute their own weights before torch 2.8")

LAYERS = 5


class Net(nn.Module):
    """Five layers with rows of three lengths; ``scale`` is a hook into the middle of the pass."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 27, 1)
        self.fc = nn.Linear(27, 4)
        self.between = lambda: None

    def forward(self, x, parts=("left", "right")):
        x = self.norm(self.stem(x)).relu()
        self.between()
        for part in parts:
            x = x + getattr(self, part)(x).relu()
        return self.fc(self.point(x).mean((2, 3)))


def pair(variant: str = "ws", alpha: float | str = 1.0, dtype=torch.float64, **options) -> tuple[Net, Net]:
    """The same network twice: its layers compute their own weights, and all at once."""
    torch.manual_seed(0)
    own = Net().to(dtype)
    to_enc(own, variant, alpha, packed=False, post_norm=False, **options)
    packed = copy.deepcopy(own)
    pack_weights(packed, True)
    return own, packed


def images(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


def norms(call) -> int:
    """How often ``call`` computes weights by eq. 22: once a layer, or once for each length of rows."""
    with Operations() as counted:
        call()
    return counted.names["native_group_norm"]


def assert_same_gradients(own: nn.Module, packed: nn.Module, run=lambda net: net(images())) -> None:
    """Outputs and gradients of one backward pass agree to rounding; no gradient for what the pass does not use."""
    outputs = []
    for net in (own, packed):
        net.zero_grad()
        outputs.append(run(net))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs)
    for (name, p), q in zip(own.named_parameters(), packed.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("alpha", [2.0, "learnable"])
@pytest.mark.parametrize("variant", ALL)
def test_outputs_and_gradients_are_those_of_the_layers(variant, alpha, memory_format):
    own, packed = (net.to(memory_format=memory_format) for net in pair(variant, alpha))
    assert_same_gradients(own, packed, lambda net: net(images().contiguous(memory_format=memory_format)))
    assert all(p.grad.stride() == p.stride() or 1 in p.shape for p in packed.parameters())


def test_the_weights_come_in_one_operation_for_each_length_of_rows():
    own, packed = pair()
    assert norms(lambda: own(images())) == LAYERS
    assert norms(lambda: packed(images())) == 3


def test_a_layer_that_is_put_in_later_is_packed_from_its_second_pass_on():
    own, packed = pair()
    assert norms(lambda: packed(images())) == 3
    packed.right = copy.deepcopy(packed.right)
    assert norms(lambda: packed(images())) == 4
    assert norms(lambda: packed(images())) == 3
    assert_same_gradients(own, packed)
    shared = copy.copy(packed)  # its hooks are those of the original
    shared._modules = {**packed._modules, "left": copy.deepcopy(packed.left)}
    assert norms(lambda: shared(images())) == norms(lambda: packed(images())) == 3


@pytest.mark.parametrize("variant", ["ws", "fro"])
def test_fifty_steps_of_training_are_the_same(variant):
    nets = pair(variant, "learnable", torch.float32)
    for net in nets:
        optimizer = torch.optim.SGD(param_groups_enc(net, 1e-2), lr=0.05, momentum=0.9)
        add_shift(optimizer)
        for _ in range(50):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images(torch.float32)), torch.arange(4))
            loss.backward()
            optimizer.step()
    assert loss < 1.0
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4)


def test_autocast_gets_weights_in_its_dtype_where_it_is_on():
    own, packed = pair(dtype=torch.float32)
    seen = []
    for net in (own, packed):
        net.fc.register_forward_hook(lambda layer, args, out: seen.append(out.dtype))

        class Full(nn.Module):
            def __init__(self, conv):
                super().__init__()
                self.conv = conv

            def forward(self, x):
                with torch.autocast("cpu", enabled=False):
                    return self.conv(x.float())

        net.right = Full(net.right)
    x = images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert norms(lambda: packed(x)) == 3 + 1  # that of the layer without autocast
        outputs = [net(x) for net in (own, packed)]
    assert torch.equal(*outputs)  # weights in bfloat16 differ if they round differently
    assert set(seen) == {torch.bfloat16}


def test_a_layer_may_be_used_twice_or_not_at_all():
    own, packed = pair()
    for parts in (("left", "left"), ("right",), (), ("left", "right"), ("left", "right")):
        assert_same_gradients(own, packed, lambda net, parts=parts: net(images(), parts))
    assert norms(lambda: packed(images())) == 3  # layers that are used again are computed with the others again


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_sees_each_change_of_the_weights(mode):
    own, packed = pair()
    own.eval(), packed.eval()
    with mode():
        assert norms(lambda: packed(images())) == 3

        def assert_equal() -> None:
            torch.testing.assert_close(packed(images()), own(images()))

        assert_equal()
        for net in (own, packed):
            net.left.weight.data.normal_(generator=torch.Generator().manual_seed(3))
        assert_equal()
        state = {key: value + 0.1 if key == "stem.weight" else value for key, value in own.state_dict().items()}
        for net in (own, packed):
            net.load_state_dict(state)
        assert_equal()
        for net in (own, packed):
            net.right.weight.data = net.left.weight.data + 1
        assert_equal()


def change_data(net: Net) -> None:
    net.right.weight.data = net.right.weight.data.flip(0)


def change_in_place(net: Net) -> None:
    with torch.no_grad():
        net.right.weight.copy_(net.right.weight.flip(0))


def load(net: Net) -> None:
    net.right.load_state_dict({**net.right.state_dict(), "weight": net.right.weight.detach().flip(0)})


def replace(net: Net) -> None:
    net.right.weight = nn.Parameter(net.right.weight.detach().flip(0))


def step(net: Net) -> None:
    net.right.weight.grad = torch.ones_like(net.right.weight) * torch.arange(9.0, dtype=torch.float64).view(3, 3)
    torch.optim.SGD([net.right.weight], lr=0.1, foreach=True).step()
    net.right.weight.grad = None


@pytest.mark.parametrize("change", [change_data, change_in_place, load, replace, step])
def test_a_weight_that_changes_in_the_middle_of_a_pass_is_the_new_one(change):
    own, packed = pair()
    for net in (own, packed):
        net.between = lambda net=net: change(net)
    assert_same_gradients(own, packed)


def test_averages_that_a_pass_writes_through_data_are_read_after_that():
    """As in self-supervised networks, whose target network is an average that each pass renews."""

    class Pair(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.online, self.target = net, copy.deepcopy(net).requires_grad_(False)

        def forward(self, x):
            found = self.online(x)
            for p, q in zip(self.target.parameters(), self.online.parameters(), strict=True):
                p.data.mul_(0.5).add_(q.data.flip(0))
            return found + self.target(x)

    own, packed = (Pair(net) for net in pair())
    pack_weights(packed, True)
    assert_same_gradients(own, packed)


def test_a_layer_that_clips_its_weight_when_called_computes_with_the_clipped_one():
    own, packed = pair()

    def clip(layer, args):
        layer.weight.data.clamp_(-0.05, 0.05)

    for net in (own, packed):
        net.right.register_forward_pre_hook(clip)
    assert_same_gradients(own, packed)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_pass_that_an_exception_ended(error):
    own, packed = pair()

    def fail():
        raise error

    packed.between = fail
    with pytest.raises(error):
        packed(images())
    packed.between = lambda: None
    for net in (own, packed):
        net.left.weight.data.add_(torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(2)))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(packed.left(x), own.left(x))  # alone: it computes its own
    assert_same_gradients(own, packed)


def test_parts_and_single_layers_compute_their_own():
    own, packed = pair()
    assert norms(lambda: packed.left(torch.randn(1, 8, 5, 5, dtype=torch.float64))) == 1
    assert_same_gradients(own, packed, lambda net: net.left(net.stem(images())))


def test_networks_within_networks_and_calls_of_themselves():
    class Outer(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.inner, self.before = net, nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)
            self.depth = 0

        def forward(self, x):
            if self.depth == 0:
                self.depth = 1
                x = self(x)
                self.depth = 0
                return self.inner(self.before(x))
            return self.before(x) + self.inner(x).mean()

    own, packed = pair()
    torch.manual_seed(0)
    own, packed = Outer(own), Outer(packed)
    packed.load_state_dict(own.state_dict())
    to_enc(own, packed=False, post_norm=False, exclude="before")
    assert_same_gradients(own, packed)
    pack_weights(packed, True)
    assert_same_gradients(own, packed)


def test_threads_do_not_see_the_passes_of_others():
    _, packed = pair()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    found = []

    def elsewhere():
        with torch.enable_grad():
            found.append(norms(lambda: packed.right(x)))

    def between():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    packed.between = between
    packed(images())
    assert found == [1]


def test_frozen_layers_get_no_gradient():
    own, packed = pair()
    for net in (own, packed):
        net.stem.requires_grad_(False)
        net.left.requires_grad_(False)
    assert_same_gradients(own, packed)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_compute_with_their_own_weights(way):
    own, packed = pair()
    for net in (own, packed):
        del net.between  # functions in it cannot be pickled
        net.__class__ = Plain
    packed(images())
    twin, expected = way(packed), way(own)
    for net in (twin, expected):
        net.left.weight.data.neg_()
    assert_same_gradients(expected, twin)
    assert norms(lambda: twin(images())) == 3


class Plain(Net):
    @staticmethod
    def between() -> None:
        pass


@pytest.mark.parametrize("where", ["a layer", "the network"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, where):
    class Recomputed(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return checkpoint(self.conv, x, use_reentrant=use_reentrant)

    own, packed = pair()
    if where == "a layer":
        for net in (own, packed):
            net.left = Recomputed(net.left)
        assert_same_gradients(own, packed)
    else:
        x = images().requires_grad_()
        assert_same_gradients(own, packed, lambda net: checkpoint(net, x, use_reentrant=use_reentrant))


def test_saving_activations_elsewhere_changes_nothing():
    own, packed = pair()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        assert norms(lambda: packed(images())) == 3
        assert_same_gradients(own, packed)


def test_second_derivatives_are_those_of_the_layers():
    own, packed = pair()
    found = []
    for net in (own, packed):
        x = images().requires_grad_()
        weights = [net.stem.weight, net.left.weight, net.fc.weight]
        loss = net(x).pow(3).sum()
        first = torch.autograd.grad(loss, [x, *weights], create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), weights)))
    torch.testing.assert_close(*found)


def test_functional_calls_compute_with_the_parameters_that_they_get():
    own, packed = pair()
    params = {key: (p.detach() + 0.1).requires_grad_() for key, p in own.named_parameters()}
    outputs = [torch.func.functional_call(net, params, (images(),)) for net in (own, packed)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(out.square().sum(), list(params.values())) for out in outputs]
    torch.testing.assert_close(*gradients)
    batch = images()[:, None]
    for transform in (
        lambda f: torch.func.grad(lambda p: f(p, images()).square().sum())(params),
        lambda f: torch.func.vmap(f, (None, 0))(params, batch),
        lambda f: torch.func.jvp(lambda p: f(p, images()), (params,), (params,))[1],
    ):
        found = [transform(lambda p, x, net=net: torch.func.functional_call(net, p, (x,))) for net in (own, packed)]
        torch.testing.assert_close(*found)
    assert_same_gradients(own, packed)  # and its own again


def test_pruned_and_parametrized_layers_compute_their_own():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight + 1

    own, packed = pair()
    for net in (own, packed):
        prune.random_unstructured(net.left, "weight", 0)  # none, and the mask is there
        prune.l1_unstructured(net.left, "weight", 0.5)
        parametrize.register_parametrization(net.right, "weight", Double())
    assert_same_gradients(own, packed)
    assert norms(lambda: packed(images())) == 3


def test_hooks_of_weights_are_called_with_gradients():
    def treble(p):
        p.grad.mul_(3)

    own, packed = pair()
    for net in (own, packed):
        net.right.weight.register_hook(lambda grad: grad * 2)
        net.left.weight.register_post_accumulate_grad_hook(treble)
    assert_same_gradients(own, packed)
    assert_same_gradients(own, packed, lambda net: net(images(), ("left",)))


def test_exports_traces_and_compilers_see_the_layers_own_operations():
    own, packed = pair(dtype=torch.float32)
    own.eval(), packed.eval()
    x = images(torch.float32)
    expected = own(x).detach()
    for made in (
        torch.jit.trace(packed, x),
        torch.export.export(packed, (x,)).module(),
        torch.compile(packed, backend="eager", fullgraph=True),
    ):
        torch.testing.assert_close(made(x).detach(), expected)
    torch.testing.assert_close(packed(x).detach(), expected)


def _train_under_ddp(rank: int, store: str) -> None:
    """Of the layer ``right`` the second step has a gradient in rank 0 alone, and the third step in neither rank."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = []
    (own, packed), again = pair(), pair()[1]
    # In one part, and in a part for each layer.
    for net, part_bytes in ((own, 0), (packed, 2**30), (again, 1)):
        enc_plugin.packed._PART_BYTES = part_bytes
        order = []

        def watch(layer, args, out, order=order):
            out.register_hook(lambda grad: order.append("first layer"))

        net.stem.register_forward_hook(watch)
        ddp = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1e-4, find_unused_parameters=True)

        def exchange(state, bucket, order=order):
            order.append("weights" if any(p.ndim > 1 for p in bucket.parameters()) else "biases")
            return default_hooks.allreduce_hook(None, bucket)

        ddp.register_comm_hook(None, exchange)
        optimizer = torch.optim.SGD(param_groups_enc(net, 1e-2), lr=0.1, momentum=0.9)
        for parts in (("left", "right"), ("left", "right") if rank == 0 else ("left",), ("left",), ("left", "right")):
            optimizer.zero_grad()
            del order[:]
            ddp(images() * (rank + 1), parts).square().sum().backward()
            optimizer.step()
        found.append([p.detach() for p in net.parameters()])
        is_early = order.index("weights") < order.index("first layer")
        assert is_early == (net is not packed)
    for weights in found[1:]:
        torch.testing.assert_close(weights, found[0])
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_without_it_and_exchange_gradients_early(tmp_path):
    mp.spawn(_train_under_ddp, args=(str(tmp_path / "store"),), nprocs=2)


def test_folding_leaves_no_hooks():
    _, packed = pair()
    plain = fold(packed)
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
    torch.testing.assert_close(plain(images()), packed(images()))


def test_it_can_be_switched_and_is_off_on_a_cpu():
    _, packed = pair()
    for choice, expected in (("auto", LAYERS), (False, LAYERS), (True, 3), (True, 3)):
        pack_weights(packed, choice)
        assert norms(lambda: packed(images())) == expected
    with pytest.raises(ValueError, match="packed: expected 'auto', True or False, got 'on'"):
        to_enc(packed, packed="on")
