"""Given batch norm, ENC is a change of gauge: which networks train alike, step by step, and which do not.

Batch norm makes a network invariant to the scale of each row of the weight in front of it. So networks whose effective
weights differ by row factors alone have the same loss as a function of W, the same gradient and, with the same decay,
the same steps of SGD: in float64 they agree to rounding once batch norm's own eps is out of the way. The classes are
{row means kept, removed} x {classifier batch norm, none}; ``docs/gauge.md`` has the algebra. This is an oracle for
layers, surgery and optimizer at once.

Two controls keep the comparisons honest: one weight moved by 1e-10 has to show, and the other class has to differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from enc_plugin import to_enc
from enc_plugin.engine import ENCOptimWrapperConstructor

STEPS = 30
NO_EPS = 1e-18  # batch norm's eps where it may not matter: what is left of it in the losses grows in proportion
DECAY = 1e-2
SHIFT = dict(shift_eps=0.05)  # large enough to change the losses by more than 1e-4
ROUNDING = 1e-12


def network(bn_eps: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 8), (8, 8), (8, 12)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out, eps=bn_eps), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5, eps=bn_eps)]
    return nn.Sequential(*layers).double()


def enc(variant: str, alpha: float = 1.0) -> Callable[[nn.Module], None]:
    """Surgery that makes every layer ENC."""

    def convert(model: nn.Module) -> None:
        report = to_enc(model, variant, alpha)
        assert (len(report), report.num_post_norms) == (4, 0)

    return convert


def plain(model: nn.Module) -> None:
    pass


def weight_standardization(model: nn.Module) -> None:
    """Every layer computes with rows of mean 0 and standard deviation 1, by the literal formula (Qiao et al., 2019)."""

    def standardized(layer: nn.Module) -> torch.Tensor:
        rows = layer.weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, unbiased=False, keepdim=True)
        return rows.view_as(layer.weight)

    replace_weight(model, standardized)


def weight_normalization(model: nn.Module) -> None:
    """Every layer computes with ``g W_j / ||W_j||``, g a learnable gain a row (Salimans & Kingma, 2016)."""
    for layer in layers(model):
        layer.gain = nn.Parameter(torch.linspace(0.5, 2, len(layer.weight), dtype=torch.float64))

    def normalized(layer: nn.Module) -> torch.Tensor:
        rows = layer.weight.flatten(1)
        return (layer.gain[:, None] * rows / rows.norm(dim=1, keepdim=True)).view_as(layer.weight)

    replace_weight(model, normalized)


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model if isinstance(module, (nn.Conv2d, nn.Linear))]


def replace_weight(model: nn.Module, effective: Callable[[nn.Module], torch.Tensor]) -> None:
    for layer in layers(model):
        if isinstance(layer, nn.Conv2d):
            layer.forward = lambda x, layer=layer: nn.functional.conv2d(x, effective(layer), layer.bias, padding=1)
        else:
            layer.forward = lambda x, layer=layer: nn.functional.linear(x, effective(layer), layer.bias)


def moved_by_1e_10(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-10


@cache
def losses(*surgeries: Callable, bn_eps: float = NO_EPS, shift: str | None = None) -> torch.Tensor:
    """Losses of :data:`STEPS` steps of SGD with momentum and decay; ``shift``: the rule by which all weights get it."""
    model = network(bn_eps)
    for surgery in surgeries:
        surgery(model)
    optimizer = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=DECAY)
    paramwise = dict(shift_eps=0) if shift is None else dict(**SHIFT, plain_shift=shift)
    wrapper = ENCOptimWrapperConstructor(dict(optimizer=optimizer), paramwise)(model)
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(STEPS):
        images = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(5, (16,), generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        wrapper.update_params(loss)
        out.append(loss.detach())
    return torch.stack(out)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


ENC = {variant: enc(variant) for variant in ("fro", "wn", "ws", "centered_fro")}


@pytest.mark.parametrize("surgery", [plain, ENC["ws"]], ids=["plain", "ws"])
def test_one_weight_moved_by_1e_10_shows(surgery):
    assert apart(losses(surgery), losses(moved_by_1e_10, surgery)) > 10 * ROUNDING


@pytest.mark.parametrize("variant", ["fro", "wn"])
def test_norm_only_variants_train_like_the_plain_network(variant):
    assert apart(losses(ENC[variant]), losses(plain)) < ROUNDING


@pytest.mark.parametrize("variant", ["fro", "wn"])
def test_the_eps_of_batch_norm_is_what_is_left_of_norm_only_variants(variant):
    assert apart(losses(ENC[variant], bn_eps=1e-5), losses(plain, bn_eps=1e-5)) > 1e-4


def test_eq_21_with_the_shift_is_the_plain_network_with_the_same_shift():
    assert apart(losses(ENC["wn"], shift="wn"), losses(plain, shift="wn")) < ROUNDING
    assert apart(losses(plain, shift="wn"), losses(plain)) > 1e-4, "the shift acts"


@pytest.mark.parametrize("shift", [None, "ws"])
def test_eq_22_is_weight_standardization_on_every_layer(shift):
    assert apart(losses(ENC["ws"], shift=shift), losses(weight_standardization, shift=shift)) < ROUNDING


def test_the_shift_acts_under_eq_22():
    assert apart(losses(ENC["ws"], shift="ws"), losses(ENC["ws"])) > 1e-4


@pytest.mark.parametrize("shift", [None, "wn"])
def test_weight_normalization_is_the_plain_network(shift):
    assert apart(losses(weight_normalization, shift=shift), losses(plain, shift=shift)) < ROUNDING


@pytest.mark.parametrize("alpha", [0.25, 9.0])
@pytest.mark.parametrize("variant", ENC)
def test_any_constant_alpha_is_alpha_1(variant, alpha):
    assert apart(losses(enc(variant, alpha), shift="ws"), losses(ENC[variant], shift="ws")) < ROUNDING


@pytest.mark.parametrize("variant", ["ws", "centered_fro"])
def test_centered_variants_train_differently(variant):
    assert apart(losses(ENC[variant]), losses(plain)) > 1e-3


def test_eq_23_keeps_the_means_of_rows_and_so_is_not_eq_22():
    assert apart(losses(ENC["centered_fro"]), losses(ENC["ws"])) > 1e-3


def test_without_a_batch_norm_behind_the_classifier_scale_is_no_gauge():
    def headless(*surgeries):
        def drop_last_norm(model):
            del model[-1]

        return losses(drop_last_norm, *surgeries)

    def enc_but_classifier(model):
        to_enc(model, "wn", exclude=str(len(model) - 1))

    def enc_with_classifier(model):
        to_enc(model, "wn", post_norm=False)

    assert apart(headless(enc_but_classifier), headless(plain)) < ROUNDING
    assert apart(headless(enc_with_classifier), headless(plain)) > 1e-3
