"""The shift belongs to the groups: every optimizer that has them applies it once a step, and copies do so too."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
import weakref
from collections import OrderedDict

import pytest
import torch
from functional.test_decay import literal as shifted
from helpers import NEW_TIMM
from mmpretrain.registry import OPTIMIZERS
from timm.optim import create_optimizer_v2
from torch import nn, optim
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

import enc_plugin.functional.grouped
from enc_plugin import ENCLinear, add_projection, add_shift, param_groups_enc, to_enc

LR, DECAY, EPS = 0.05, 0.3, 0.5


def layer(variant: str = "wn") -> ENCLinear:
    torch.manual_seed(0)
    return ENCLinear(6, 4, bias=False, variant=variant, dtype=torch.float64)


def groups_of(model: nn.Module, eps: float = EPS, **options) -> list[dict]:
    return param_groups_enc(model, weight_decay=DECAY, shift_eps=eps, **options)


def assert_shifts(optimizer, weight: torch.Tensor, eps: float = EPS, lr: float = LR, decay: float = DECAY) -> None:
    """Step without a gradient: W - lr lambda (W - eps U), for SGD without momentum and for AdamW."""
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - lr * decay * shifted(before, "wn", eps), rtol=0, atol=1e-14)


def penalty(weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """The regularizer itself for 'wn', which autograd differentiates."""
    return DECAY / 2 * (weight.norm(dim=1) - eps).square().sum()


# Coupled: the stock optimizer without decay on the loss with the regularizer in it takes the same steps.
COUPLED = {
    "SGD": (optim.SGD, dict(momentum=0.9)),
    "SGD, nesterov": (optim.SGD, dict(momentum=0.9, nesterov=True)),
    "SGD, dampening": (optim.SGD, dict(momentum=0.9, dampening=0.5)),
    "SGD, fused": (optim.SGD, dict(momentum=0.9, fused=True)),
    "SGD, foreach": (optim.SGD, dict(momentum=0.9, foreach=True)),
    "Adam": (optim.Adam, dict(foreach=False)),
    "Adam, amsgrad": (optim.Adam, dict(amsgrad=True, fused=True)),
    "NAdam": (optim.NAdam, {}),
    "RAdam": (optim.RAdam, {}),
    "Adagrad": (optim.Adagrad, {}),
    "Adadelta": (optim.Adadelta, {}),
    "Adamax": (optim.Adamax, {}),
    "ASGD": (optim.ASGD, {}),
    "RMSprop": (optim.RMSprop, dict(momentum=0.9, centered=True)),
    "Rprop": (optim.Rprop, {}),
    "LBFGS": (optim.LBFGS, dict(max_iter=4)),
    "LBFGS, one evaluation": (optim.LBFGS, dict(max_iter=1)),
}


def train(cls, options: dict, eps: float | None, closure: bool, by_hand: bool = False, steps: int = 8) -> torch.Tensor:
    """Weights after a few steps; ``by_hand`` puts the regularizer into the loss instead of the groups."""
    fc = layer()
    x = torch.randn(8, 6, dtype=torch.float64)
    groups = fc.parameters() if by_hand else groups_of(fc, eps)
    optimizer = cls(groups, lr=LR, **options)

    def evaluate():
        optimizer.zero_grad()
        loss = fc(x).pow(4).mean()
        value = loss.detach().clone()
        (loss + penalty(fc.weight, eps) if by_hand else loss).backward()
        return value

    for _ in range(steps):
        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    return fc.weight.detach()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.filterwarnings("ignore:ENC. .* has no weight decay")
def test_coupled_decay_is_the_regularizer_in_the_loss(name, closure):
    cls, options = COUPLED[name]
    if name.startswith("LBFGS") and not closure:
        pytest.skip("needs a closure")
    came = train(cls, options, EPS, closure)
    torch.testing.assert_close(came, train(cls, options, EPS, closure, by_hand=True), rtol=0, atol=1e-10)
    assert (came - train(cls, options, 0.0, closure)).abs().max() > 1e-3


# Decoupled: W - lr lambda (W - eps U), then the update of the same optimizer without decay.
DECOUPLED = {
    "AdamW": lambda groups: optim.AdamW(groups, lr=LR, foreach=True),
    "AdamW, fused": lambda groups: optim.AdamW(groups, lr=LR, fused=True),
    "AdamW, tensor lr": lambda groups: optim.AdamW(groups, lr=torch.tensor(LR, dtype=torch.float64)),
    "NAdam": lambda groups: optim.NAdam(groups, lr=LR, decoupled_weight_decay=True),
    "RAdam": lambda groups: optim.RAdam(groups, lr=LR, decoupled_weight_decay=True),
    "timm lion": lambda groups: create_optimizer_v2(groups, opt="lion", lr=LR),
    "timm sgdw": lambda groups: create_optimizer_v2(groups, opt="sgdw", lr=LR),
    "timm nadamw": lambda groups: create_optimizer_v2(groups, opt="nadamw", lr=LR),
}
if hasattr(optim, "Muon"):
    DECOUPLED["Muon"] = lambda groups: optim.Muon(groups, lr=LR)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_decay_takes_a_share_of_the_weight_from_it(name, closure):
    torch.manual_seed(1)
    fc, grads = layer(), [torch.randn(4, 6, dtype=torch.float64) for _ in range(8)]
    free = nn.Parameter(torch.zeros_like(fc.weight))
    optimizer = DECOUPLED[name](groups_of(fc))
    bare = DECOUPLED[name]([dict(params=[free], weight_decay=0.0)])
    expected = fc.weight.detach().clone()
    for grad in grads:
        fc.weight.grad = free.grad = None
        before = free.detach().clone()
        free.grad = grad.clone()
        bare.step()
        expected = expected - LR * DECAY * shifted(expected, "wn", EPS) + (free.detach() - before)

        def evaluate(grad=grad):
            fc.weight.grad = grad.clone()
            return torch.zeros(())

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    atol = 1e-3 if name == "Muon" else 1e-10  # Muon orthogonalises in bfloat16
    torch.testing.assert_close(fc.weight.detach(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda groups: optim.Adafactor(groups, lr=LR),
        lambda groups: OPTIMIZERS.get("LARS")(groups, lr=20.0, momentum=0.5),
        lambda groups: OPTIMIZERS.get("Lamb")(groups, lr=LR),
        *(
            lambda groups, name=name: create_optimizer_v2(groups, opt=name, lr=LR)
            for name in ("adan", "adamc")
            if NEW_TIMM
        ),
        lambda groups: create_optimizer_v2(groups, opt="lars", lr=40.0),
        lambda groups: create_optimizer_v2(groups, opt="adamp", lr=100 * LR),  # a hundredth of the decay
    ],
)
def test_without_a_gradient_rows_of_every_optimizer_settle_at_eps(make, closure):
    fc = layer()
    optimizer = make(groups_of(fc, 0.1))
    for _ in range(600):
        fc.weight.grad = torch.zeros_like(fc.weight)
        optimizer.step(*[lambda: torch.zeros(())] if closure else [])
    length = fc.weight.detach().norm(dim=1)
    torch.testing.assert_close(length, torch.full_like(length, 0.1), rtol=0, atol=1e-3)


def test_the_shift_follows_the_settings_of_the_group():
    fc = layer()
    optimizer = optim.SGD(groups_of(fc), lr=LR)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert_shifts(optimizer, fc.weight)
    schedule.step()
    assert_shifts(optimizer, fc.weight, lr=LR / 2)
    optimizer.param_groups[0].update(weight_decay=0.2, shift_eps=0.25)
    assert_shifts(optimizer, fc.weight, lr=LR / 2, decay=0.2, eps=0.25)
    del optimizer.param_groups[0]["shift_eps"]
    assert_shifts(optimizer, fc.weight, lr=LR / 2, decay=0.2, eps=0.0)


@pytest.mark.parametrize(("lr", "decay"), [(0.0, 0.3), (1.0, 1.0), (2.0, 0.75)])
def test_decoupled_decay_is_exact_at_any_rate(lr, decay):
    fc = layer()
    optimizer = optim.AdamW(param_groups_enc(fc, weight_decay=decay, shift_eps=EPS), lr=lr)
    assert_shifts(optimizer, fc.weight, lr=lr, decay=decay)


@pytest.mark.parametrize("cls", [optim.SGD, optim.AdamW])
def test_maximizing_the_objective_still_decays_to_eps(cls):
    fc = layer()
    assert_shifts(cls(groups_of(fc), lr=LR, maximize=True), fc.weight)


@pytest.mark.parametrize("times", [0, 1, 3])
def test_add_shift_may_be_called_any_number_of_times(times):
    fc = layer()
    optimizer = optim.SGD(groups_of(fc), lr=LR)
    for _ in range(times):
        add_shift(optimizer)
    assert_shifts(optimizer, fc.weight)
    for _ in range(times):
        add_shift(optimizer)
    assert_shifts(optimizer, fc.weight)


@pytest.mark.parametrize("decoupled", [None, True])
@pytest.mark.parametrize("first", [nn.Linear(3, 2), ENCLinear(3, 2, variant="wn")])
def test_groups_that_come_later_are_shifted(first, decoupled):
    fc = layer()
    optimizer = optim.SGD(groups_of(first), lr=LR)
    add_shift(optimizer, decoupled)
    optimizer.step()
    for group in groups_of(fc):
        optimizer.add_param_group(group)
    assert optimizer.param_groups[-1].get("enc_decoupled") is decoupled
    assert_shifts(optimizer, fc.weight)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy of a copy": lambda optimizer: copy.deepcopy(copy.deepcopy(optimizer)),
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "shallow copy": copy.copy,
}


@pytest.mark.parametrize("cls", [optim.SGD, optim.AdamW])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("prepared", [False, True])
def test_copies_shift_as_the_original_does(cls, way, prepared):
    fc = layer()
    optimizer = cls(groups_of(fc), lr=LR)
    if prepared:
        add_shift(optimizer)
        assert_shifts(optimizer, fc.weight)
        optimizer.state.clear()  # without AdamW's past
    twin = COPIES[way](optimizer)
    assert_shifts(twin, twin.param_groups[0]["params"][0])
    if way != "shallow copy":
        assert_shifts(optimizer, fc.weight)


def test_an_explicit_word_on_the_decay_stays_with_copies_and_state_dicts():
    fc = layer()
    optimizer = optim.SGD(groups_of(fc), lr=LR, momentum=0.9)
    add_shift(optimizer, decoupled=True)
    assert copy.deepcopy(optimizer).param_groups[0]["enc_decoupled"]
    again = optim.SGD(fc.parameters(), lr=LR, momentum=0.9)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["enc_decoupled"]


def test_a_pickled_optimizer_names_the_module_that_shifts_it_where_it_is_unpickled():
    optimizer = optim.SGD(groups_of(layer()), lr=LR)
    assert b"enc_plugin" not in pickle.dumps(optimizer)
    add_shift(optimizer)
    assert b"enc_plugin.shift" in pickle.dumps(optimizer)
    assert "enc_plugin" not in str(optimizer.state_dict())


def test_a_prepared_optimizer_is_freed_with_its_last_reference():
    optimizer = optim.SGD(groups_of(layer()), lr=LR)
    add_shift(optimizer)
    optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None


def states() -> tuple[dict, dict]:
    fc = layer()
    return optim.SGD(fc.parameters(), lr=LR, weight_decay=DECAY).state_dict(), optim.SGD(
        groups_of(fc), lr=LR
    ).state_dict()


@pytest.mark.parametrize("prepare", [add_shift, copy.deepcopy, lambda optimizer: optimizer.step()])
def test_loading_a_state_keeps_the_shift_of_the_optimizer_and_warns(prepare):
    plain, other = states()
    fc = layer()
    optimizer = optim.SGD(groups_of(fc, 0.25), lr=LR)
    if prepare is copy.deepcopy:
        add_shift(optimizer)
    optimizer = prepare(optimizer) or optimizer
    with pytest.warns(
        UserWarning, match="shift_eps of 1 tensors: the loaded state has 0.5, this optimizer.* with 0.25"
    ):
        optimizer.load_state_dict(other)
    with pytest.warns(UserWarning, match="shift_eps.*has no shift, this optimizer was made with 0.25"):
        optimizer.load_state_dict(plain)
    assert_shifts(optimizer, optimizer.param_groups[0]["params"][0], eps=0.25)
    assert (plain, other) == states()  # the loaded states are the caller's


def test_an_optimizer_made_without_shift_takes_the_one_it_loads():
    _, state = states()
    fc = layer()
    optimizer = optim.SGD(fc.parameters(), lr=LR)
    optimizer.load_state_dict(state)
    assert_shifts(optimizer, fc.weight)


def test_an_epsilon_of_zero_is_a_setting_too():
    _, state = states()
    fc = layer()
    optimizer = optim.SGD(groups_of(fc, 0.0), lr=LR)
    add_shift(optimizer)
    with pytest.warns(UserWarning, match="has 0.5, this optimizer was made with no shift"):
        optimizer.load_state_dict(state)
    assert_shifts(optimizer, fc.weight, eps=0.0)


def test_equal_settings_load_without_a_word():
    _, state = states()
    fc = layer()
    optimizer = optim.SGD(groups_of(fc), lr=LR)
    add_shift(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state)
    assert_shifts(optimizer, fc.weight)


# Wrappers: as their authors write them.


class SAM(optim.Optimizer):
    """Sharpness-aware minimization around another optimizer, which shares its groups."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, dict(rho=rho, **options))
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups
        self.rho = rho

    @torch.no_grad()
    def step(self, closure):
        (p,) = self.param_groups[0]["params"]
        push = self.rho * p.grad / p.grad.norm()
        p.add_(push)
        with torch.enable_grad():
            closure()
        p.sub_(push)
        self.base.step()


def test_sam_decays_once_at_the_true_weight():
    fc = layer()
    x = torch.randn(8, 6, dtype=torch.float64)
    optimizer = SAM(groups_of(fc), optim.SGD, lr=LR)
    add_shift(optimizer)

    def evaluate():
        fc.zero_grad()
        fc(x).pow(4).mean().backward()

    for _ in range(3):
        evaluate()
        before, grad = fc.weight.detach().clone(), fc.weight.grad.clone()
        optimizer.step(evaluate)
        at = (before + 0.05 * grad / grad.norm()).requires_grad_()
        (at / at.norm(dim=1, keepdim=True) / 2 @ x.T).pow(4).mean().backward()
        expected = before - LR * (at.grad + DECAY * shifted(before, "wn", EPS))
        torch.testing.assert_close(fc.weight.detach(), expected, rtol=0, atol=1e-12)


class Clipping(optim.SGD):
    """A step of one's own that ends in the stock one."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 100.0)
        super().step()
        return loss


class Passing(optim.SGD):
    """A step of one's own that leaves the closure to the stock one."""

    def step(self, closure=None):
        return super().step(closure)


class Twice(optim.SGD):
    """Two stock steps in one."""

    def step(self, closure=None):
        with torch.enable_grad():
            super().step(closure)
            return super().step(closure)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("cls", [Clipping, Passing])
def test_an_overridden_step_shifts_once(cls, closure):
    came = train(cls, {}, EPS, closure)
    torch.testing.assert_close(came, train(optim.SGD, {}, EPS, closure), rtol=0, atol=1e-14)


def test_two_steps_in_one_are_two_steps():
    came = train(Twice, {}, EPS, closure=True, steps=4)
    torch.testing.assert_close(came, train(optim.SGD, {}, EPS, closure=True, steps=8), rtol=0, atol=1e-14)


class Delegate(optim.Optimizer):
    """Holds another optimizer as ``hold`` says."""

    def __init__(self, inner, hold):
        super().__init__(inner.param_groups, inner.defaults)
        self.keep(inner, hold)

    def keep(self, inner, hold):
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults
        self.held = hold(inner)
        self.inner_step = inner.step

    def step(self, closure=None):
        return self.inner_step(closure)


class Unhooked(optim.Optimizer):
    """The same without torch's constructor, as timm's Lookahead."""

    keep = Delegate.keep

    def __init__(self, inner, hold):
        self.keep(inner, hold)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

    def step(self, closure=None):
        return self.inner_step(closure)


HOLDS = {"itself": lambda inner: inner, "in a list": lambda inner: [inner], "in a dict": lambda inner: {"all": inner}}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("cls", [Delegate, Unhooked])
def test_a_wrapper_leaves_the_shift_to_the_optimizer_that_it_holds(cls, hold, closure):
    def make(groups, lr):
        wrapper = cls(optim.SGD(groups, lr=lr, momentum=0.9), HOLDS[hold])
        add_shift(wrapper)
        return wrapper

    came = train(make, {}, EPS, closure)
    torch.testing.assert_close(came, train(optim.SGD, dict(momentum=0.9), EPS, closure), rtol=0, atol=0)


def test_look_ahead_shifts_each_fast_step():
    fc = layer()
    slow = fc.weight.detach().clone()
    optimizer = create_optimizer_v2(groups_of(fc), opt="lookahead_momentum", lr=LR, momentum=0.0)
    add_shift(optimizer)
    fast = slow.clone()
    for _ in range(12):  # its slow weights start at the sixth step, and then go half of the way each sixth step
        optimizer.zero_grad()
        fc.weight.grad = torch.zeros_like(fc.weight)
        optimizer.step()
        fast = fast - LR * DECAY * shifted(fast, "wn", EPS)
        if _ == 5:
            slow = fast
    torch.testing.assert_close(fc.weight.detach(), slow + 0.5 * (fast - slow), rtol=0, atol=1e-13)


class Hidden(optim.Optimizer):
    """Runs another optimizer that is nowhere among its attributes."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.run = lambda closure: inner.step(closure)

    def step(self, closure=None):
        return self.run(closure)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(("opt", "decoupled"), [("momentum", False), ("adamw", True)])
def test_a_wrapper_that_hides_its_optimizer_shifts_once(opt, decoupled, closure):
    def stock(groups, lr):
        return create_optimizer_v2(groups, opt=opt, lr=lr)

    def hidden(groups, lr):
        wrapper = Hidden(stock(groups, lr))
        add_shift(wrapper, decoupled)
        return wrapper

    came = train(hidden, {}, EPS, closure)
    torch.testing.assert_close(came, train(stock, {}, EPS, closure), rtol=0, atol=1e-14)


def test_a_wrapper_whose_groups_are_stale_after_loading_shifts_those_that_step():
    """apex's LARC keeps the groups of its optimizer, which loading replaces."""
    fc = layer()
    inner = optim.SGD(groups_of(fc), lr=LR)
    wrapper = Delegate(inner, lambda inner: inner)
    add_shift(wrapper)
    inner.load_state_dict(inner.state_dict())
    assert wrapper.param_groups[0] is not inner.param_groups[0]
    inner.param_groups[0]["lr"] = LR / 2
    assert_shifts(wrapper, fc.weight, lr=LR / 2)


def test_optimizers_that_step_within_the_backward_pass_shift_their_own_weights():
    first, second = layer(), layer()
    x = torch.randn(8, 6, dtype=torch.float64)
    optimizers = {fc.weight: optim.AdamW(groups_of(fc), lr=LR) for fc in (first, second)}

    def step(p):
        optimizers[p].step()
        p.grad = None

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    together = nn.ModuleList([layer(), layer()])
    stock = optim.AdamW(groups_of(together), lr=LR)

    def loss(a, b):
        return (a(x) * b(x)).sum().square()

    for _ in range(3):
        loss(first, second).backward()
        loss(*together).backward()
        stock.step()
        stock.zero_grad()
    torch.testing.assert_close(first.weight, together[0].weight, rtol=0, atol=1e-14)
    torch.testing.assert_close(second.weight, together[1].weight, rtol=0, atol=1e-14)


class FullyDecoupled(optim.Optimizer):
    """Shrinks the weights by 1 - lambda, whatever the learning rate."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["weight_decay"]).sub_(p.grad.sign(), alpha=group["lr"])


@pytest.mark.parametrize("decoupled", [None, True])
def test_adafactor_that_chooses_its_learning_rate_in_the_step_is_shifted_with_that(decoupled, recwarn):
    fc = layer()
    optimizer = create_optimizer_v2(groups_of(fc), opt="adafactor", lr=None)
    add_shift(optimizer, decoupled)
    for _ in range(2):
        before = fc.weight.detach().clone()
        fc.weight.grad = torch.zeros_like(before)
        optimizer.step()
        share = optimizer.param_groups[0]["lr"] * DECAY
        assert share > 0
        torch.testing.assert_close(fc.weight.detach(), before - share * shifted(before, "wn", EPS), rtol=0, atol=1e-14)
    assert not recwarn.list


@pytest.mark.parametrize("lr", [LR, 0.0])
def test_a_decay_without_the_learning_rate_is_shifted_without_it(lr):
    fc = layer()
    optimizer = FullyDecoupled(groups_of(fc), lr=lr)
    before, grad = fc.weight.detach().clone(), torch.randn(4, 6, dtype=torch.float64)
    fc.weight.grad = grad
    optimizer.step()
    expected = before - DECAY * shifted(before, "wn", EPS) - lr * grad.sign()
    torch.testing.assert_close(fc.weight.detach(), expected, rtol=0, atol=1e-14)


def test_a_step_that_does_not_call_its_closure_is_named():
    class Deaf(optim.SGD):
        def step(self, closure=None):
            return None

    optimizer = Deaf(groups_of(layer()), lr=LR)
    add_shift(optimizer, decoupled=False)
    with pytest.warns(UserWarning, match="Deaf.step did not call its closure"):
        optimizer.step(lambda: 0.0)


def test_a_wrapper_that_takes_the_decay_upon_itself_is_named():
    fc = layer()
    optimizer = optim.SGD(groups_of(fc), lr=LR)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    before = fc.weight.detach().clone()
    fc.weight.grad = torch.zeros_like(fc.weight)
    with pytest.warns(UserWarning, match="has weight_decay 0 within the step.*LARC.*does not support the shift"):
        optimizer.step()
    assert torch.equal(fc.weight, before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", [optim.SGD, optim.Adam, optim.AdamW])
def test_the_scale_of_a_gradient_scaler_does_not_reach_the_shift(cls, fused):
    fc, twin = layer().float(), layer().float()
    optimizer, stock = (cls(groups_of(net), lr=LR, fused=fused) for net in (fc, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(8, 6)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(fc(x).pow(4).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        stock.zero_grad()
        twin(x).pow(4).mean().backward()
        stock.step()
    torch.testing.assert_close(fc.weight, twin.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["reparametrize", "project"])
def test_the_momentum_of_fused_sgd_starts_at_zero_if_a_scaler_skips_the_first_step(how, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    nets, optimizers = [], []
    for fused in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        to_enc(net, how=how)
        groups = param_groups_enc(net, 1e-2, **({"projection": "retract"} if how == "project" else {}))
        nets.append(net)
        optimizers.append(optim.SGD(groups, lr=LR, momentum=0.9, fused=fused))
        if how == "project":
            add_projection(optimizers[-1])
    x = torch.randn(8, 6)
    torch.use_deterministic_algorithms(True)  # memory that is not initialised holds NaN
    try:
        for net, optimizer in zip(nets, optimizers, strict=True):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            for i in range(4):
                optimizer.zero_grad()
                scaler.scale(net(x).pow(2).mean() * (math.inf if i == 0 else 1)).backward()
                scaler.step(optimizer)
                scaler.update()
    finally:
        torch.use_deterministic_algorithms(False)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opt", ["adamw", *(["lamb"] if NEW_TIMM else [])])
def test_a_step_that_is_compiled_from_the_first_on_is_the_eager_one(opt):
    torch._dynamo.reset()
    weights = []
    for compiled in (False, True):
        fc = layer()
        optimizer = create_optimizer_v2(groups_of(fc), opt=opt, lr=LR, foreach=True)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            fc.weight.grad = torch.ones_like(fc.weight)
            step()
        weights.append(fc.weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)  # compiled, the count of steps is a float32 tensor


def test_torchs_distributed_state_dict_carries_the_shift():
    """Loading it takes a step with learning rate 0 beforehand, which must leave the weights alone."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    fc, again = layer(), layer()
    optimizer = optim.AdamW(groups_of(fc), lr=LR)
    assert_shifts(optimizer, fc.weight)
    state = get_optimizer_state_dict(fc, optimizer)
    fresh = optim.AdamW(groups_of(again, 0.25), lr=LR)
    add_shift(fresh)
    before = again.weight.detach().clone()
    with pytest.warns(UserWarning, match="shift_eps.*has 0.5, this optimizer was made with 0.25"):
        set_optimizer_state_dict(again, fresh, optim_state_dict=state)
    assert torch.equal(again.weight, before)
    assert_shifts(fresh, again.weight, eps=0.25)


def test_zero_redundancy_shifts_once(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fc = layer()
        optimizer = ZeroRedundancyOptimizer(groups_of(fc), optim.SGD, lr=LR)
        add_shift(optimizer)
        assert_shifts(optimizer, fc.weight)
        fc.weight.grad = None

        def evaluate():
            fc.weight.grad = torch.zeros_like(fc.weight)
            return torch.zeros(())

        before = fc.weight.detach().clone()
        optimizer.step(evaluate)
        expected = before - LR * DECAY * shifted(before, "wn", EPS)
        torch.testing.assert_close(fc.weight.detach(), expected, rtol=0, atol=1e-14)
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_weights_are_refused_unless_their_decay_is_plain(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fc = layer()
        fully_shard(fc, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        for apply in (add_shift, lambda optimizer: optimizer.step()):
            with pytest.raises(
                ValueError,
                match="shape .4, 6. is sharded or flattened.*train with DDP, or use ENC layers with shift_eps=0",
            ):
                apply(optim.SGD(groups_of(fc), lr=LR))
        add_shift(optim.SGD(groups_of(fc, 0.0), lr=LR))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("where", ["the step", "the closure"])
@pytest.mark.parametrize("base", [optim.SGD, optim.AdamW, OPTIMIZERS.get("Lamb")])
def test_a_step_that_fails_costs_no_later_step_its_shift(base, where):
    class Failing(base):
        fails = False

        def step(self, closure=None):
            loss = closure()
            if self.fails:
                raise RuntimeError("out of memory")
            super().step()
            return loss

    def evaluate():
        fc.weight.grad = torch.zeros_like(fc.weight)
        if where == "the closure" and optimizer.fails:
            raise RuntimeError("out of memory")

    fc, twin = layer(), layer()
    optimizer, never_failed = Failing(groups_of(fc), lr=LR), base(groups_of(twin), lr=LR)
    add_shift(optimizer)
    optimizer.fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(evaluate)
    if base is optim.AdamW:  # what it failed to step stays shifted, by lr lambda eps
        fc.load_state_dict(twin.state_dict())
    optimizer.fails = False
    for _ in range(2):
        optimizer.step(evaluate)
        twin.weight.grad = torch.zeros_like(twin.weight)
        never_failed.step()
        torch.testing.assert_close(fc.weight, twin.weight, rtol=0, atol=1e-14)


def test_the_shift_comes_after_all_other_hooks_before_a_step():
    fc = layer()
    optimizer = optim.SGD(groups_of(fc), lr=1.0)
    add_shift(optimizer)
    optimizer.register_step_pre_hook(lambda o, *_: torch.nn.utils.clip_grad_norm_([fc.weight], 1e-9) and None)
    for _ in range(2):
        before = fc.weight.detach().clone()
        fc.weight.grad = torch.ones_like(fc.weight)
        optimizer.step()
        expected = before - DECAY * shifted(before, "wn", EPS)
        torch.testing.assert_close(fc.weight.detach(), expected, rtol=0, atol=1e-8)


def test_hooks_after_a_step_see_the_true_weights():
    fc = layer()
    optimizer = OPTIMIZERS.get("Lamb")(groups_of(fc), lr=LR)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(fc.weight.detach().clone()))
    fc.weight.grad = torch.zeros_like(fc.weight)
    add_shift(optimizer)
    optimizer.step()
    assert torch.equal(seen[0], fc.weight.detach())


@pytest.mark.parametrize("opt", ["lamb", "adamp"])
def test_a_closure_computes_with_the_true_weights(opt):
    fc = layer()
    optimizer = create_optimizer_v2(groups_of(fc), opt=opt, lr=LR)
    seen = []

    def evaluate():
        seen.append(fc.weight.detach().clone())
        fc.weight.grad = torch.ones_like(fc.weight)
        return torch.zeros(())

    before = [fc.weight.detach().clone()]
    for _ in range(2):
        optimizer.step(evaluate)
        before.append(fc.weight.detach().clone())
    assert torch.equal(seen[0], before[0])
    assert torch.equal(seen[1], before[1])


def test_a_differentiable_step_keeps_its_graph():
    weight = layer().weight.detach()[:2, :3]

    def after(start, grad, cls):
        p = start.clone()
        p.grad = grad
        cls([dict(params=[p], weight_decay=DECAY, enc_variant="wn", shift_eps=EPS)], lr=LR, differentiable=True).step()
        return p

    grad = torch.randn_like(weight)
    for cls in (optim.SGD, optim.AdamW):
        arguments = (weight.clone().requires_grad_(), grad.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda start, grad, cls=cls: after(start, grad, cls), arguments)


def test_optimizers_of_other_networks_are_left_alone():
    model = nn.Linear(3, 2)
    optimizer = optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    keys = set(vars(optimizer))
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert set(vars(optimizer)) == keys
    assert not optimizer._optimizer_step_pre_hooks


def test_weights_that_decay_without_a_shift_are_pointed_out_once(recwarn):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    plain = copy.deepcopy(model)
    to_enc(model)
    stock = [optim.SGD(model.parameters(), lr=LR, weight_decay=0.1), optim.AdamW(model.parameters())]
    for optimizer in stock:
        with pytest.warns(UserWarning, match="the weights of 2 ENC layers decay without the epsilon shift"):
            add_shift(optimizer)
    for network in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(UserWarning, match="the weights of 2 ENC layers decay without the epsilon shift"):
            optim.SGD(network.parameters(), lr=LR, weight_decay=0.1).step()
    optimizer = optim.SGD(param_groups_enc(model, 0.0), lr=LR)
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.1  # as a schedule does that begins at 0
    with pytest.warns(UserWarning, match="the weights of 2 ENC layers decay without the epsilon shift"):
        optimizer.step()
    recwarn.clear()
    for optimizer in stock:
        optimizer.step()
    for optimizer in (
        optim.SGD(plain.parameters(), lr=LR, weight_decay=0.1),
        optim.SGD(model.parameters(), lr=LR),
        optim.SGD(param_groups_enc(model, 0.1, shift_eps=0), lr=LR),
        optim.SGD(param_groups_enc(model, 0.1), lr=LR),
    ):
        add_shift(optimizer)
        optimizer.step()
    assert not recwarn


def test_what_cannot_be_shifted_is_refused():
    class Bare(optim.Optimizer):
        def __init__(self, groups):
            self.param_groups, self.state, self.defaults = groups, {}, {}

        def step(self, closure=None): ...

    with pytest.raises(ValueError, match="optimizer: Bare runs no step hooks.*call torch.optim.Optimizer.__init__"):
        add_shift(Bare([{**groups_of(layer())[0], "lr": LR}]))
    group = dict(params=list(layer().parameters()), weight_decay=DECAY, shift_eps=EPS)
    with pytest.raises(ValueError, match="a group with shift_eps lacks enc_variant; build groups with"):
        add_shift(optim.SGD([group], lr=LR))
    with pytest.raises(ValueError, match="shift_eps: expected a finite number"):
        add_shift(optim.SGD([group | dict(enc_variant="wn", shift_eps=-1.0)], lr=LR))
    with pytest.raises(TypeError, match="optimizer: expected a torch optimizer"):
        add_shift(group)


def test_an_optimizer_without_decay_of_its_own_is_named():
    with pytest.warns(UserWarning, match="Rprop has no weight decay"):
        add_shift(optim.Rprop(groups_of(layer()), lr=LR))


def test_an_optimizer_that_no_trial_can_tell_is_taken_as_coupled_with_a_warning():
    class Other(optim.Optimizer):
        def step(self, closure=None):
            raise NotImplementedError

    optimizer = Other(groups_of(layer()), dict(lr=LR))
    with pytest.warns(
        UserWarning, match="unknown optimizer Other: assuming.*through the gradient.*Pass decoupled=True"
    ):
        add_shift(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_shift(Other(groups_of(layer()), dict(lr=LR)), decoupled=True)


def test_groups_show_their_decay_outside_of_the_step_whatever_ends_it():
    """Torch's own optimizers leave the decay to the shift, which reads gradient and weight anyway."""
    seen = []

    fc = layer()
    optimizer = optim.SGD(groups_of(fc), lr=LR, momentum=0.9)
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(opt.param_groups[0]["weight_decay"]))
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(opt.param_groups[0]["weight_decay"]))
    assert_shifts(optimizer, fc.weight)
    assert seen == [DECAY, DECAY]
    assert optimizer.param_groups[0]["weight_decay"] == DECAY
    optimizer.param_groups[0]["momentum"] = "bad"  # ends the step after the shift
    for look in (
        lambda: optimizer.state_dict()["param_groups"][0],
        lambda: copy.deepcopy(optimizer).param_groups[0],
        lambda: pickle.loads(pickle.dumps(optimizer)).param_groups[0],
    ):
        with pytest.raises(TypeError):
            optimizer.step()
        assert look()["weight_decay"] == DECAY


@pytest.mark.parametrize("variant", ["wn", "ws", "fro", "centered_fro"])
def test_rows_in_pieces_are_shifted_as_the_whole(variant, monkeypatch):
    """On a CPU the terms are computed for as many rows as its cache holds."""
    found = []
    for piece in (2**18, 13):  # two rows
        monkeypatch.setattr(enc_plugin.functional.grouped, "_BLOCK", piece)
        fc = layer(variant)
        optimizer = optim.SGD(groups_of(fc), lr=LR)
        fc.weight.grad = torch.ones_like(fc.weight)
        optimizer.step()
        found.append(fc.weight.detach())
    assert torch.equal(*found)
