"""Weights that optimizers hold on the constraint set."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lamb, Lars, create_optimizer_v2
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from enc_plugin import ENCLinear, add_shift, param_groups_enc, to_enc
from enc_plugin.functional import VARIANTS, enc_weight
from enc_plugin.functional.retraction import retract_
from enc_plugin.functional.rotation import equilibrium_angle
from enc_plugin.functional.weights import num_rows
from enc_plugin.layers import ENCLayer
from enc_plugin.projection import add_projection


def network(seed=0):
    """Batch norm behind every layer, so that scales are a gauge (but for batch norm's eps, which is tiny)."""
    torch.manual_seed(seed)
    eps = dict(eps=1e-14)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6, **eps),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False, groups=2),
        nn.BatchNorm2d(8, **eps),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5, bias=False),
        nn.BatchNorm1d(5, **eps),
    ).double()


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        images = torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64)
        yield images, torch.randint(0, 5, (16,), generator=generator)


def weights_of(model):
    return [m.weight for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]


def groups_of(model, mode, variant="ws", alpha=1.0, decay=1e-2):
    held = weights_of(model)
    rest = [p for p in model.parameters() if not any(p is w for w in held)]
    settings = dict(enc_projection=mode, enc_variant=variant, enc_alpha=alpha, weight_decay=decay)
    return [{"params": held, **settings}, {"params": rest}]


def train(model, optimizer, steps=5, seed=1, after=lambda: None):
    losses = []
    for images, labels in batches(steps, seed):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


SGD = dict(lr=0.1, momentum=0.9)
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, **SGD),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
}
# Without decay, these two do not adapt steps to norms.
ADAPTIVE = {"Lamb": lambda p: Lamb(p, lr=1e-2, eps=1e-12), "Lars": lambda p: Lars(p, lr=1.0)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["retract", "rotate"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_constraint_holds_after_every_step(variant, mode, optimizer):
    model = network().float()
    optimizer = OPTIMIZERS[optimizer](groups_of(model, mode, variant, alpha=2.0))
    add_projection(optimizer)
    for images, labels in batches(5):
        before = [w.detach().clone() for w in weights_of(model)]
        optimizer.zero_grad()
        F.cross_entropy(model(images.float()), labels).backward()
        optimizer.step()
        for old, weight in zip(before, weights_of(model), strict=True):
            assert weight.square().sum().item() == pytest.approx(2.0, rel=1e-6)
            torch.testing.assert_close(weight, enc_weight(weight, variant, 2.0), rtol=1e-6, atol=1e-7)
            assert not torch.equal(old, weight)


def losses_of_layers(variant, make, power, disturbed=0.0, put_back=True):
    """Losses of ENC layers whose learning rate is divided by the norm's power, and whose weights are put on the set."""
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += disturbed
    norms = {id(w): _direction(w, variant).norm().item() for w in weights_of(model)}
    to_enc(model, variant, post_norm=False, example=torch.zeros(2, 3, 6, 6, dtype=torch.float64))
    optimizer = make([{"params": [p for p in model.parameters() if p.ndim == 1]}])
    for weight in weights_of(model):
        optimizer.add_param_group({"params": [weight], "lr": optimizer.defaults["lr"] / norms[id(weight)] ** power})

    def back():
        with torch.no_grad():
            retract_([layer.weight for layer in model if isinstance(layer, ENCLayer)], variant, 1.0)

    back()
    return torch.tensor(train(model, optimizer, 20, after=back if put_back else lambda: None), dtype=torch.float64)


def losses_of_retraction(variant, make):
    model = network()
    optimizer = make(groups_of(model, "retract", variant))
    add_projection(optimizer)
    return torch.tensor(train(model, optimizer, 20), dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_retraction_is_the_reparametrization_whose_free_weight_is_put_on_the_set_after_each_step(variant):
    losses = losses_of_retraction(variant, OPTIMIZERS["SGD"])
    torch.testing.assert_close(losses, losses_of_layers(variant, OPTIMIZERS["SGD"], 2), rtol=0, atol=1e-10)
    # What the comparison would see, and: the norm grows, and the steps become smaller.
    assert (losses - losses_of_layers(variant, OPTIMIZERS["SGD"], 2, disturbed=1e-8)).abs().max() > 1e-9
    assert (losses - losses_of_layers(variant, OPTIMIZERS["SGD"], 2, put_back=False)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_adam_that_holds_for_the_variants_that_keep_means(variant):
    def make(groups):
        return torch.optim.Adam(groups, lr=1e-2)

    difference = (losses_of_retraction(variant, make) - losses_of_layers(variant, make, 1)).abs().max()
    assert difference < 1e-10 if variant in ("fro", "wn") else difference > 1e-3


def _direction(weight, variant):
    rows = weight.detach().reshape(num_rows(weight, variant), -1)
    return rows - rows.mean(1, keepdim=True) if variant in ("ws", "centered_fro") else rows


@pytest.mark.parametrize("optimizer", OPTIMIZERS | ADAPTIVE)
def test_the_first_step_of_retraction_is_that_of_the_plain_network(optimizer):
    outputs = []
    for mode, begins in ((None, False), ("retract", True), ("retract", False)):
        model = network()
        own = (OPTIMIZERS | ADAPTIVE)[optimizer](groups_of(model, mode, "fro", decay=1e-9))
        if begins:
            add_projection(own)
        train(model, own, 1)
        outputs.append(model(next(iter(batches(1, 2)))[0]))
    for held in outputs[1:]:
        torch.testing.assert_close(held, outputs[0], rtol=1e-6, atol=1e-6)


def test_weights_that_the_first_step_takes_to_the_set_take_the_step_from_there():
    models = network(), network()
    for model, begins in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD(groups_of(model, "retract", "wn"), **SGD)
        if begins:
            add_projection(optimizer)
        train(model, optimizer, 3)
    for a, b in zip(*(weights_of(model) for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rotation_turns_by_the_angle_of_equilibrium_of_the_groups_own_settings(optimizer):
    model = network()
    optimizer = OPTIMIZERS[optimizer](groups_of(model, "rotate", "wn", decay=0.08))
    train(model, optimizer, 2)
    before = [w.detach().clone() for w in weights_of(model)]
    optimizer.param_groups[0]["lr"] *= 0.1  # as schedules do
    optimizer.param_groups[0]["weight_decay"] /= 4
    train(model, optimizer, 1, seed=3)
    group = optimizer.param_groups[0]
    beta = group["betas"][0] if "betas" in group else 0.0
    angle = equilibrium_angle(group["lr"], 0.02, beta or 0.9, beta)
    for old, weight in zip(before, weights_of(model), strict=True):
        cosines = F.cosine_similarity(old.flatten(1), weight.detach().flatten(1))
        torch.testing.assert_close(cosines.acos(), torch.full_like(cosines, angle), rtol=1e-6, atol=0)
    assert group["weight_decay"] == 0.02


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["retract", "rotate"])
def test_a_resumed_run_is_the_unbroken_one(mode, optimizer):
    whole, broken = network(), network()
    whole_optimizer, first = (OPTIMIZERS[optimizer](groups_of(m, mode)) for m in (whole, broken))
    train(whole, whole_optimizer, 3)
    train(whole, whole_optimizer, 3, seed=5)
    train(broken, first, 3)
    state = pickle.loads(pickle.dumps((broken.state_dict(), first.state_dict())))
    resumed = network(seed=7)
    optimizer = OPTIMIZERS[optimizer](groups_of(resumed, mode))
    add_projection(optimizer)
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(resumed, optimizer, 3, seed=5)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("other", [None, "rotate"])
def test_groups_stay_held_as_they_were_made_when_another_state_is_loaded(other):
    model, saved = network(), network()
    before = torch.optim.SGD(groups_of(saved, other, decay=0.02), **SGD)
    train(saved, before, 2)
    optimizer = torch.optim.SGD(groups_of(model, "retract"), **SGD)
    add_projection(optimizer)
    model.load_state_dict(saved.state_dict())
    with pytest.warns(UserWarning, match=f"the loaded state has {other!r}.*made with 'retract'"):
        optimizer.load_state_dict(before.state_dict())
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["enc_projection"] == "retract"
    assert optimizer.param_groups[0]["weight_decay"] == 0.02
    assert all(w.square().sum().item() == pytest.approx(1, rel=1e-12) for w in weights_of(model))


def test_steps_keep_the_size_for_initial_norms_when_the_mode_changes_and_momentum_starts_anew():
    runs = []
    for first in ("retract", "rotate"):
        model = network()
        optimizer = torch.optim.SGD(groups_of(model, first), **SGD)
        add_projection(optimizer)
        initial = [w.detach().clone() for w in weights_of(model)]
        train(model, optimizer, 2)
        again = network()
        twin = torch.optim.SGD(groups_of(again, "retract"), **SGD)
        add_projection(twin)
        again.load_state_dict(model.state_dict())
        with torch.no_grad():  # the same weights after either mode
            torch._foreach_copy_(weights_of(again), initial)
        with nullcontext() if first == "retract" else pytest.warns(UserWarning, match="their momentum starts anew"):
            twin.load_state_dict(optimizer.state_dict())
        for weight in weights_of(again):
            twin.state[weight].clear()
        add_projection(twin)
        for weight in weights_of(again):
            weight.grad = torch.ones_like(weight).cumsum(-1)
        twin.step()
        runs.append([w.detach() for w in weights_of(again)])
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-14)


def test_a_plain_optimizer_that_loads_a_held_state_stays_plain_and_decays():
    saved, model = network(), network()
    before = torch.optim.SGD(groups_of(saved, "retract", decay=0.02), **SGD)
    train(saved, before, 2)
    held, rest = groups_of(model, None)
    optimizer = torch.optim.SGD([{"params": held["params"], "weight_decay": 0.5}, rest], **SGD)
    with pytest.warns(UserWarning, match="no group has enc_projection, so nothing is projected"):
        add_projection(optimizer)
    with pytest.warns(UserWarning, match="the loaded state has 'retract'.*made with None"):
        optimizer.load_state_dict(before.state_dict())
    assert optimizer.param_groups[0]["weight_decay"] == 0.02
    assert not any(key.startswith("enc_") for key in optimizer.param_groups[0])


def test_a_copy_of_the_optimizer_holds_its_weights_too():
    model = network()
    optimizer = torch.optim.SGD(groups_of(model, "retract"), **SGD)
    train(model, optimizer, 2)
    model, optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, 1)
    assert all(w.square().sum().item() == pytest.approx(1, rel=1e-12) for w in weights_of(model))


def test_an_optimizer_is_projected_where_it_is_unpickled_and_nothing_else_imports_this_package(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(groups_of(model, "retract"), **SGD)
    add_projection(optimizer)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    (tmp_path / "optimizer.pkl").write_bytes(pickle.dumps(optimizer))
    steps = """
import pickle, sys
optimizer = pickle.load(open(sys.argv[1], "rb"))
for group in optimizer.param_groups:
    for p in group["params"]:
        p.grad = p.detach().sin()
optimizer.step()
print(max(abs(p.square().sum().item() - 1) for p in optimizer.param_groups[0]["params"]))
"""
    command = [sys.executable, "-c", steps, str(tmp_path / "optimizer.pkl")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(printed.splitlines()[-1]) < 1e-12  # the maintained fork of mmengine prints a line, too


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "copy of a pickle": lambda optimizer: copy.deepcopy(pickle.loads(pickle.dumps(optimizer))),
    "copy of a shallow copy": lambda optimizer: copy.deepcopy(copy.copy(optimizer)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("first", ["shift", "projection"])
def test_a_copy_projects_and_shifts_and_keeps_both_when_it_loads_another_state(way, first):
    model = nn.Sequential(nn.Linear(4, 6), ENCLinear(6, 5))
    to_enc(model[0], how="project", post_norm=False)
    groups = param_groups_enc(model, lr=0.1, weight_decay=1e-2)
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=1e-2)
    for prepare in (add_shift, add_projection) if first == "shift" else (add_projection, add_shift):
        prepare(optimizer)
    twin = way(optimizer)
    settings = [{"params": g["params"], "weight_decay": 1e-2} for g in optimizer.param_groups]
    plain = torch.optim.SGD(settings, lr=0.1)
    with pytest.warns(UserWarning, match="ENC: projection of"), pytest.warns(UserWarning, match="ENC: shift_eps of"):
        twin.load_state_dict(plain.state_dict())
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    twin.step()
    (held,) = (group["params"][0] for group in twin.param_groups if "enc_projection" in group)
    assert held.square().sum().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["retract", "rotate"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_a_gradient_scaler_skips_leaves_the_weights(cls, mode, fused):
    models = network(), network()
    optimizers = [cls(groups_of(m, mode), lr=1e-2, fused=fused) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for optimizer in optimizers:
        add_projection(optimizer)
    for i, (images, labels) in enumerate(batches(4)):
        for model, optimizer, is_scaled in zip(models, optimizers, (True, False), strict=True):
            before = [w.detach().clone() for w in weights_of(model)]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            if not is_scaled:
                if i != 2:
                    loss.backward()
                    optimizer.step()
                continue
            scaler.scale(loss).backward()
            if i == 2:
                model[0].weight.grad[0, 0, 0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            if i == 2:  # a fused optimizer skips it within its step, after which weights are projected once more
                tolerance = dict(rtol=1e-14, atol=1e-16) if fused else dict(rtol=0, atol=0)
                torch.testing.assert_close([w.detach() for w in weights_of(model)], before, **tolerance)
    assert scaler.get_scale() == 128
    for a, b in zip(*(weights_of(model) for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_step_with_a_closure_is_the_step_without():
    models = network(), network()
    optimizers = [torch.optim.SGD(groups_of(m, "retract"), **SGD) for m in models]
    for optimizer in optimizers:
        add_projection(optimizer)
    for images, labels in batches(4):
        for model, optimizer, with_closure in zip(models, optimizers, (False, True), strict=True):

            def closure(model=model, optimizer=optimizer, images=images, labels=labels):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class _Wrapper(torch.optim.Optimizer):
    """An optimizer around another, with its groups."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()


def test_an_optimizer_around_another_holds_them_once():
    models = network(), network()
    inner = [torch.optim.SGD(groups_of(m, "retract"), **SGD) for m in models]
    for optimizer in inner:
        add_projection(optimizer)
    train(models[0], inner[0])
    train(models[1], _Wrapper(inner[1]))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class _Pair(torch.optim.Optimizer):
    """Steps its groups by two optimizers of different kinds."""

    def __init__(self, *inner):
        super().__init__([group for one in inner for group in one.param_groups], {})
        self.inner = inner

    def step(self, closure=None):
        for one in self.inner:
            one.step()


def test_an_optimizer_around_one_that_projects_nothing_starts_without_a_warning():
    model = network()
    held, rest = groups_of(model, "retract")
    optimizer = _Pair(torch.optim.SGD([held], **SGD), torch.optim.AdamW([rest]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_projection(optimizer)
    assert all(w.square().sum().item() == pytest.approx(1, rel=1e-12) for w in weights_of(model))


class _Averaging(_Wrapper):
    """Moves weights after the step of the inner optimizer, towards where they were."""

    def step(self, closure=None):
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)
        with torch.no_grad():
            torch._foreach_lerp_([p for group in self.param_groups for p in group["params"]], before, 0.5)


def test_weights_that_an_optimizer_around_another_moves_return_to_the_set():
    model = network()
    train(model, _Averaging(torch.optim.SGD(groups_of(model, "retract"), **SGD)))
    for weight in weights_of(model):
        torch.testing.assert_close(weight, enc_weight(weight, "ws"), rtol=1e-12, atol=1e-14)


class _Derived(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def test_a_step_that_calls_that_of_its_class_is_one_step():
    models = network(), network()
    for model, kind in zip(models, (torch.optim.SGD, _Derived), strict=True):
        train(model, kind(groups_of(model, "retract"), **SGD))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_an_exception_ended_leaves_nothing_behind():
    models = network(), network()
    optimizers = [torch.optim.SGD(groups_of(m, "retract", decay=0.02), **SGD) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        add_projection(optimizer)
        train(model, optimizer, 1)
    for look in (lambda x: x.state_dict()["param_groups"][0], lambda x: copy.deepcopy(x).param_groups[0]):
        failing = _Failing(optimizers[1].param_groups, **SGD)
        failing.fails = True
        with pytest.raises(ArithmeticError):
            train(models[1], failing, 1)
        assert look(failing)["weight_decay"] == 0.02
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 2, seed=4)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


class _Failing(torch.optim.SGD):
    fails = False

    def step(self, closure=None):
        super().step()
        if self.fails:
            raise ArithmeticError


def test_weights_without_a_gradient_rest():
    model = network()
    optimizer = torch.optim.SGD(groups_of(model, "rotate"), **SGD)
    train(model, optimizer, 1)
    frozen = model[0].weight
    frozen.requires_grad_(False)
    frozen.grad = None
    before = frozen.detach().clone()
    train(model, optimizer, 2)
    assert torch.equal(frozen, before)


def test_a_group_that_is_added_later_is_held():
    model = network()
    held, rest = groups_of(model, "retract")
    optimizer = torch.optim.SGD([rest], **SGD)
    train(model, optimizer, 1)
    optimizer.add_param_group(held)
    train(model, optimizer, 1)
    assert all(w.square().sum().item() == pytest.approx(1, rel=1e-12) for w in weights_of(model))


def test_groups_that_an_optimizer_of_another_kind_takes_over_take_its_steps():
    model = network()
    first = torch.optim.SGD(groups_of(model, "retract"), **SGD)
    add_projection(first)
    assert first.param_groups[0]["enc_power"] == 2
    second = torch.optim.AdamW(first.param_groups)
    add_projection(second)
    assert second.param_groups[0]["enc_power"] == 1


def test_a_group_whose_weights_changed_is_refused():
    model = network()
    optimizer = torch.optim.SGD(groups_of(model, "retract"), **SGD)
    add_projection(optimizer)
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match="a projected group has 2 weights, and it had 3 at its first step"):
        optimizer.step()


def test_an_optimizer_around_another_prepares_it():
    model = network()
    optimizer = create_optimizer_v2(groups_of(model, "retract"), opt="lookahead_momentum", lr=0.1)
    add_projection(optimizer)
    assert all(w.square().sum().item() == pytest.approx(1, rel=1e-12) for w in weights_of(model))
    with pytest.raises(ValueError, match="unknown for RAdam"):
        add_projection(create_optimizer_v2(groups_of(model, "retract"), opt="lookahead_radam", lr=0.1))


def test_retraction_of_weights_that_are_on_the_set_from_the_start_warns_of_their_small_norms():
    model = network()
    add_projection(torch.optim.SGD(groups_of(model, "retract"), **SGD))
    with pytest.warns(UserWarning, match="3 projected weights have squared norm 1 from the start"):
        add_projection(torch.optim.SGD(groups_of(model, "retract"), **SGD))


@pytest.mark.parametrize(("variant", "value"), [("wn", 0.0), ("ws", 0.1), ("fro", float("nan"))])
def test_a_weight_that_cannot_be_normalised_is_refused_before_any_is_changed(variant, value):
    model = network()
    with torch.no_grad():
        model[7].weight.fill_(value) if variant == "fro" else model[7].weight[1].fill_(value)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"1 of . rows of a projected weight of shape \(5, 32\) are zero, constant or"):
        add_projection(torch.optim.SGD(groups_of(model, "retract", variant), **SGD))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_frozen_weights_off_the_set_are_refused_and_on_it_they_rest():
    model = network()
    weight = model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"weight of shape \(6, 3, 3, 3\) is frozen and off the constraint set"):
        add_projection(torch.optim.SGD(groups_of(model, "retract"), **SGD))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        retract_([weight], "ws", 1.0)
    on_set = weight.clone()
    optimizer = torch.optim.SGD(groups_of(model, "retract"), **SGD)
    add_projection(optimizer)
    train(model, optimizer, 2)
    torch.testing.assert_close(weight, on_set, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", ["radam", "rmsproptf", "madgrad"])
def test_retraction_refuses_optimizers_whose_steps_depend_on_the_size_of_gradients(name):
    """RMSpropTF, for instance, takes steps as SGD at first and by the length of gradients later."""
    with pytest.raises(ValueError, match="'retract' has to know how the length of steps depends"):
        add_projection(create_optimizer_v2(groups_of(network(), "retract"), opt=name, lr=0.1))


@pytest.mark.parametrize("prepared", [False, True])
def test_weights_shared_out_among_processes_are_refused_before_a_step(tmp_path, prepared):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        optimizer = ZeroRedundancyOptimizer(groups_of(network(), "retract"), torch.optim.SGD, **SGD)
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer steps a share of the weights in each process"):
            add_projection(optimizer) if prepared else optimizer.step()
        model = network()
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="a weight of shape .* is sharded or flattened .FSDP.*train with DDP"):
            add_projection(torch.optim.SGD(groups_of(model, "retract"), **SGD))
    finally:
        torch.distributed.destroy_process_group()


def test_what_cannot_be_held_is_refused_before_a_step():
    model = network()
    with pytest.raises(ValueError, match="'rotate' turns weights as SGD or AdamW does.*and RMSprop is neither"):
        add_projection(torch.optim.RMSprop(groups_of(model, "rotate"), lr=0.1))
    with pytest.raises(ValueError, match="expected one of 'retract', 'rotate', got 'turn'"):
        add_projection(torch.optim.SGD(groups_of(model, "turn"), **SGD))
    with pytest.raises(ValueError, match="lacks enc_variant, enc_alpha"):
        add_projection(torch.optim.SGD([{"params": [model[0].weight], "enc_projection": "retract"}], **SGD))
    with pytest.raises(ValueError, match="differentiable: the projection of a step passes no gradient on"):
        add_projection(torch.optim.SGD(groups_of(model, "retract"), differentiable=True, **SGD))
    with pytest.raises(TypeError, match="a torch optimizer"):
        add_projection(model)
