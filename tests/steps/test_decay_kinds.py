"""How an optimizer decays weights, found by a trial: torch's optimizers, timm's and mmpretrain's."""

from __future__ import annotations

import pytest
import torch
from helpers import NEW_TIMM
from mmpretrain.registry import OPTIMIZERS
from timm.optim import create_optimizer_v2
from torch import nn, optim

from enc_plugin.steps.decay_kinds import decay_kind
from enc_plugin.steps.shifted_decay import AROUND, GRADIENT, WEIGHT, WHOLE

# As their documentation says: L2 regularization in the gradient, decay of the weights themselves, neither, none.
TORCH = {
    GRADIENT: (optim.SGD, optim.Adam, optim.NAdam, optim.RAdam, optim.Adagrad, optim.Adadelta, optim.Adamax, optim.ASGD)
    + (optim.RMSprop,),
    WEIGHT: (optim.AdamW, optim.Adafactor),
    WHOLE: (optim.Rprop, optim.LBFGS),
}
TIMM = {
    GRADIENT: ("momentum", "adam", "rmsproptf", "madgrad", "lars", "larc", "adopt", "nadam", "radam"),
    WEIGHT: ("adamw", "sgdw", "lion", "nadamw", "radamw", "adafactor", "laprop", "adanw", "adabelief"),
    AROUND: ("lamb", "adamp", "adan", "adamc", "lionc"),  # AdamC, LionC: decay by lr^2 / the largest lr
}
NEW_IN_TIMM = ("adopt", "radam", "radamw", "laprop", "adan", "adamc", "lionc")


def optimizer_of(cls, dim=2, **options) -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.randn(4, 3, *[2] * (dim - 2)))
    return cls([dict(params=[weight], weight_decay=0.1)], lr=0.1, **options)


def found(optimizer) -> str | None:
    return decay_kind(optimizer, optimizer.param_groups[0])


@pytest.mark.parametrize(("kind", "cls"), [(kind, cls) for kind, classes in TORCH.items() for cls in classes])
def test_torchs_optimizers_decay_as_documented(kind, cls):
    assert found(optimizer_of(cls)) == kind


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in TIMM.items() for name in names])
def test_timms_optimizers_decay_as_documented(kind, name):
    if name in NEW_IN_TIMM and not NEW_TIMM:
        pytest.skip("this version of timm lacks it, or its decay is of another kind")
    assert found(optimizer_of(create_optimizer_v2, dim=4, opt=name, weight_decay=0.1)) == kind


def test_mmpretrains_optimizers_decay_as_documented():
    assert found(optimizer_of(OPTIMIZERS.get("LARS"), momentum=0.9)) == GRADIENT
    assert found(optimizer_of(OPTIMIZERS.get("Lamb"))) == AROUND


@pytest.mark.parametrize(
    ("cls", "options", "kind"),
    [
        (optim.SGD, dict(momentum=0.9, nesterov=True), GRADIENT),
        (optim.SGD, dict(momentum=0.9, maximize=True), GRADIENT),
        (optim.AdamW, dict(maximize=True), WEIGHT),
        (optim.AdamW, dict(differentiable=True), WEIGHT),
        (optim.Adam, dict(fused=True), GRADIENT),
        (optim.AdamW, dict(fused=True), WEIGHT),
        (optim.AdamW, dict(amsgrad=True, foreach=True), WEIGHT),
        (optim.NAdam, dict(decoupled_weight_decay=True), WEIGHT),
        (optim.RAdam, dict(decoupled_weight_decay=True), WEIGHT),  # its first five steps are SGD's
    ],
)
def test_settings_that_change_the_decay_are_seen(cls, options, kind):
    assert found(optimizer_of(cls, **options)) == kind


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="torch < 2.9")
def test_muon_decays_the_weights():
    assert found(optimizer_of(optim.Muon)) == WEIGHT


def test_a_learning_rate_may_be_a_tensor():
    weight = nn.Parameter(torch.randn(4, 3))
    optimizer = optim.AdamW([weight], lr=torch.tensor(0.1))
    assert found(optimizer) == WEIGHT
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.1)


class Own(torch.optim.Optimizer):
    """SGD with two ways to decay, and a constructor that takes something else."""

    def __init__(self, model, decoupled):
        super().__init__(model.parameters(), dict(lr=0.1, weight_decay=0.1, decoupled=decoupled, noise=0.0))

    @torch.no_grad()
    def step(self, closure=None):
        torch.rand(3)
        for group in self.param_groups:
            for p in group["params"]:
                direction = p.grad.sign() if group["decoupled"] else (p.grad + group["weight_decay"] * p).sign()
                if group["decoupled"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(direction, alpha=group["lr"])


@pytest.mark.parametrize("decoupled", [False, True])
def test_an_optimizer_of_ones_own_is_tried_without_a_trace(decoupled):
    model = nn.Linear(3, 2)
    optimizer = Own(model, decoupled)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("a hook of the optimizer ran"))
    before = [p.detach().clone() for p in model.parameters()]
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert found(optimizer) == (WEIGHT if decoupled else GRADIENT)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    assert [{**g, "params": None} for g in optimizer.param_groups] == [{**g, "params": None} for g in groups]


class ScheduleFree(optim.AdamW):
    """Steps in its mode for training alone, as the optimizers of the package schedulefree do."""

    def __init__(self, params, lr=1e-3, **options):
        super().__init__(params, lr, **options)
        for group in self.param_groups:
            group.setdefault("train_mode", False)

    def train(self):
        for group in self.param_groups:
            group["train_mode"] = True

    def step(self, closure=None):
        if not self.param_groups[0]["train_mode"]:
            raise RuntimeError("the optimizer is not in train mode")
        return super().step(closure)


@pytest.mark.parametrize("trains", [False, True])
def test_an_optimizer_with_modes_is_tried_in_that_for_training(trains):
    optimizer = optimizer_of(ScheduleFree)
    if trains:
        optimizer.train()
    assert found(optimizer) == WEIGHT
    assert optimizer.param_groups[0]["train_mode"] == trains


def test_what_cannot_be_tried_is_unknown():
    class NeedsMore(torch.optim.SGD):
        def step(self, closure, images):
            raise NotImplementedError

    assert found(optimizer_of(NeedsMore)) is None
    assert found(optimizer_of(optim.SparseAdam)) is None  # takes sparse gradients alone
