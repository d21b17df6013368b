"""Every public function and registry name, each argument fuzzed: a named error or a right result, nothing between.

A row of the tables says how to call something with good arguments, and for each argument what the documentation
admits. Hypothesis draws values of every kind. What is admitted has to work and to pass the row's own check of the
result; anything else has to end in a ``ValueError`` or ``TypeError`` that names the argument.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmengine.registry import DATASETS, HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor, nn

import enc_plugin
import enc_plugin.timm  # noqa: F401
from enc_plugin import audit, fold, to_enc
from enc_plugin.functional import (
    bound_chain,
    conv_map_sq_norm,
    enc_weight,
    fgsm,
    gbr,
    gbr_penalty,
    pgd,
    robustness_delta,
    robustness_gap,
    shift_direction,
    shifted_l2_grad,
)
from enc_plugin.measuring.robustness import measure_robustness, spread
from enc_plugin.measuring.samples import FixedSamples, choose_samples
from enc_plugin.optim import add_shift, param_groups_enc

VARIANTS = ("ws", "wn", "fro", "centered_fro")
TRIED: Counter = Counter()

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-300, 1e300, 10**30, 7]),
    st.sampled_from([math.nan, math.inf, -math.inf, np.float32(0.25), np.int64(1), np.float64("nan"), np.int64(-3)]),
    st.integers(-3, 40),
    st.floats(-10, 10),
)
OTHERS = st.one_of(
    st.sampled_from(["", "1", "0.1", "ws", "logits", "auto", "none", "learnable", "same", "pixel", "*"]),
    st.text(max_size=5),
    st.sampled_from([None, True, False, 1j, b"1", [], {}, (), [1], ["1"], [None], {"a": 1}, [[0.5]], object(), print]),
    st.builds(lambda: torch.tensor(1.0)),
    st.builds(lambda: torch.tensor([1.0, 2.0])),
    st.builds(lambda: torch.zeros(0)),
    st.builds(lambda: torch.full((2, 3), math.nan)),
    st.builds(lambda: torch.ones(2, 3, dtype=torch.int64)),
    st.builds(lambda: torch.ones(2, 3, dtype=torch.complex64)),
    st.builds(lambda: np.ones((2, 3))),
)
ANYTHING = st.one_of(NUMBERS, OTHERS)


# What documentation admits. Truth values are no numbers.
def integer(low: float, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, Integral) and not isinstance(v, bool) and low <= v <= high


def number(accepts: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, Real) and not isinstance(v, bool) and bool(accepts(v))


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda v: any(type(v) is type(w) and v == w for w in values)


def either(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: any(kind(v) for kind in kinds)


def tensor(accepts: Callable[[Tensor], bool] = lambda t: True) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, Tensor) and bool(accepts(v))


def numbers(accepts: Callable[[list], bool], single: bool = True) -> Callable[[Any], bool]:
    def check(v: Any) -> bool:
        if isinstance(v, (list, tuple)):
            return all(isinstance(x, Real) and not isinstance(x, bool) for x in v) and accepts(list(v))
        return single and isinstance(v, Real) and not isinstance(v, bool) and accepts([v])

    return check


nothing = one_of(None)
flag = one_of(True, False)
never = one_of()
positive = number(lambda v: 0 < v < math.inf)
not_negative = number(lambda v: 0 <= v < math.inf)
anything = lambda v: True  # noqa: E731

IMAGES = torch.linspace(0, 1, 2 * 12).view(2, 3, 2, 2)
LABELS = torch.tensor([0, 1])
NET = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
WEIGHT = torch.linspace(-1, 2, 12).view(3, 4).sin()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


def graph() -> dict:
    x = IMAGES.clone().requires_grad_()
    return {"inputs": x, "outputs": NET(x)}


def has_norm(what: Tensor, **call: Any) -> None:
    """Whatever positive alpha is asked for, that is the squared norm, as far as float32 holds it."""
    alpha = float(call["alpha"])
    if call["weight"] is WEIGHT and alpha > 1e-30:
        assert what.double().square().sum().item() == pytest.approx(alpha, rel=1e-4)


def is_finite(value: Any, **_: Any) -> None:
    tensors = value if isinstance(value, list) else [value]
    assert all(torch.as_tensor(v, dtype=torch.float64).isfinite().all() for v in tensors)


def within(value: Any, **call: Any) -> None:
    tensors = value if isinstance(value, list) else [value]
    budgets = call["eps"] if isinstance(value, list) else [call["eps"]]
    for adversarial, eps in zip(tensors, budgets, strict=True):
        assert (adversarial - IMAGES).abs().max() <= float(eps) + 1e-6
        assert call.get("lower", 0) <= adversarial.min().item() <= adversarial.max().item() <= call.get("upper", 1)


@dataclass
class Row:
    """``call(**good())`` works; each argument admits what its predicate says."""

    call: Callable
    good: Callable[[], dict]
    admits: dict[str, Callable[[Any], bool]]
    check: Callable[..., None] = lambda result, **call: None
    names: dict[str, str] = field(default_factory=dict)  # what the error calls the argument, where it is not its name
    left_to_the_model: Callable[[str, Any], bool] = lambda argument, value: False


def _model(kind: str) -> Callable:
    return lambda **options: MODELS.build(dict(type=kind, **options))


def _hook(kind: str) -> Callable:
    return lambda **options: HOOKS.build(dict(type=kind, **options))


def _constructor(**options: Any) -> Any:
    optimizer = {k: options.pop(k) for k in ("lr", "weight_decay")}
    paramwise = options.pop("paramwise_cfg", options)
    built = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type="ENCOptimWrapperConstructor",
            optim_wrapper_cfg=dict(optimizer=dict(type="SGD", **optimizer)),
            paramwise_cfg=paramwise,
        )
    )
    model = network()
    to_enc(model)
    return built(model)


def _classifier(**options: Any) -> nn.Module:
    backbone = dict(type="ResNetCIFAR6n", depth=options.pop("depth", 8))
    head = dict(type="LinearClsHead", num_classes=3, in_channels=64, loss=dict(type="CrossEntropyLoss"))
    return MODELS.build(
        dict(type="ENCImageClassifier", backbone=backbone, neck=dict(type="GlobalAveragePooling"), head=head, **options)
    )


def _drop_block(**options: Any) -> nn.Module:
    return MODELS.build(dict(type="DropBlockResNetCIFAR6n", depth=8, **options))


def _optimizer() -> torch.optim.Optimizer:
    model = network()
    to_enc(model)
    return torch.optim.SGD(param_groups_enc(model), lr=0.1)


def _preserved(**options: Any) -> Any:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    return to_enc(model, "wn", **options)


class _Digits(torch.utils.data.Dataset):
    """Four packed samples, as PackInputs makes them."""

    def __init__(self):
        from mmpretrain.structures import DataSample

        self.samples = [
            dict(inputs=IMAGES[i % 2] * 255, data_samples=DataSample().set_gt_label(i % 2)) for i in range(4)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.samples[index]


def _robustness(**options: Any) -> Any:
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type="mmpretrain.ImageClassifier",
            backbone=dict(type="mmpretrain.LeNet5"),
            data_preprocessor=dict(type="mmpretrain.ClsDataPreprocessor"),
        )
    )
    model.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    model.head = _Scores()
    model.backbone.forward = lambda x: (nn.Sequential.forward(model.backbone, x),)
    return measure_robustness(model.eval(), _Digits(), **options)


class _Scores(nn.Module):
    def forward(self, feats: tuple) -> Tensor:
        return feats[-1]


def share(result: Any, **_: Any) -> None:
    assert all(0 <= value <= 100 for value in (result.clean, *result.fgsm.values(), *result.pgd.values()))


def other_shape(argument: str, value: Any) -> bool:
    """Floating point inputs of a shape that the model itself does not take."""
    is_input = argument in ("inputs", "images") and isinstance(value, Tensor) and value.is_floating_point()
    return is_input and value.shape != IMAGES.shape and value.ndim > 0


variant = one_of(*VARIANTS)
weight = tensor(lambda t: t.is_floating_point() and t.ndim >= 2 and t.numel() > 0)
floats = tensor(lambda t: t.is_floating_point() and t.shape == IMAGES.shape)
labels = tensor(lambda t: t.shape == (2,) and t.dtype == torch.int64)
generator = either(nothing, lambda v: isinstance(v, torch.Generator))
scalar_tensor = tensor(lambda t: t.numel() == 1 and t.ndim == 0)
budget = either(
    numbers(lambda v: all(0 <= x <= 1 for x in v)),
    tensor(lambda t: t.ndim <= 1 and t.is_floating_point() and bool(((t >= 0) & (t <= 1)).all())),
)
pixel_eps = numbers(lambda v: bool(v) and len(set(v)) == len(v) and all(0 < x <= 255 for x in v))
up_to_3 = number(lambda v: 0 <= v <= 3)

attack = dict(
    forward=lambda v: isinstance(v, nn.Module),
    images=floats,
    labels=labels,
    eps=budget,
    lower=number(lambda v: -3e38 < v <= 0),
    upper=number(lambda v: 1 <= v < 3e38),
    loss=one_of("cross_entropy"),
)
enc_options = dict(variant=variant, alpha=either(number(lambda v: 0 < v < 1e30), one_of("learnable")))
layer = enc_options | dict(post_norm=flag)

FUNCTIONAL = {
    "enc_weight": Row(
        enc_weight,
        lambda: dict(weight=WEIGHT, variant="ws", alpha=1.0),
        dict(weight=weight, variant=variant, alpha=either(number(lambda v: 0 < v < 1e30), scalar_tensor)),
        has_norm,
    ),
    "shift_direction": Row(
        shift_direction, lambda: dict(weight=WEIGHT, variant="wn"), dict(weight=weight, variant=variant)
    ),
    "shifted_l2_grad": Row(
        shifted_l2_grad,
        lambda: dict(weight=WEIGHT, variant="wn", eps=0.5),
        dict(weight=weight, variant=variant, eps=not_negative),
    ),
    "bound_chain": Row(
        lambda **call: bound_chain(**call),
        lambda: dict(weights=[WEIGHT, 2.0]),
        dict(
            weights=either(
                numbers(lambda v: bool(v) and not any(x < 0 for x in v), single=False),
                tensor(lambda t: t.ndim == 1 and t.numel() > 0),
            )
        ),
        lambda chain, **call: chain["log_mean_power"] >= chain["log_product"] or pytest.fail("AM-GM"),
    ),
    "conv_map_sq_norm": Row(
        conv_map_sq_norm,
        lambda: dict(weight=torch.ones(1, 1, 3), input_size=(4,), stride=1, padding=1, dilation=1),
        dict(
            weight=never,
            input_size=numbers(lambda v: len(v) == 1 and integer(1, 10**6)(v[0]), single=False),
            stride=numbers(lambda v: len(v) == 1 and integer(1)(v[0])),
            padding=either(numbers(lambda v: len(v) == 1 and integer(0, 10**6)(v[0])), one_of("same", "valid")),
            dilation=numbers(lambda v: len(v) == 1 and integer(1, 2)(v[0])),
        ),
        is_finite,
        names={"dilation": "input_size|dilation", "padding": "padding", "weight": "weight|input_size"},
    ),
    "robustness_gap": Row(
        robustness_gap,
        lambda: dict(delta_s=0.1, n=100, num_cells=10, loss_bound=1.0, confidence=0.95),
        dict(
            delta_s=number(lambda v: v >= 0),
            n=number(lambda v: v >= 1),
            num_cells=number(lambda v: v >= 1),
            loss_bound=number(lambda v: v >= 0),
            confidence=number(lambda v: 0 <= v < 1),
        ),
        lambda gap, **call: gap >= call["delta_s"] or pytest.fail(f"{gap}"),
    ),
    "robustness_delta": Row(
        robustness_delta,
        lambda: dict(gradient_norm=2.0, lipschitz=1.0, cell_diameter=0.5, task="regression"),
        dict(
            gradient_norm=either(number(lambda v: not v < 0), tensor(lambda t: t.is_floating_point())),
            lipschitz=number(lambda v: v > 0),
            cell_diameter=number(lambda v: v > 0),
            task=one_of("classification", "regression"),
        ),
    ),
    "gbr": Row(
        gbr,
        lambda: dict(
            forward=NET, inputs=IMAGES, output="label_prob", labels=LABELS, projections=2, seeds=None, batch_size=1
        ),
        dict(
            forward=lambda v: isinstance(v, nn.Module),
            inputs=floats,
            output=one_of("logits", "probs", "label_prob"),
            labels=labels,
            projections=either(nothing, integer(1)),
            seeds=either(nothing, labels),
            batch_size=integer(1),
            generator=generator,
        ),
        lambda values, **call: values.shape == (2,) and bool(values.isfinite().all()),
        left_to_the_model=other_shape,
    ),
    "gbr_penalty": Row(
        lambda projections=1, generator=None, **call: gbr_penalty(
            **graph() | call, projections=projections, generator=generator
        ),
        dict,
        dict(inputs=never, outputs=never, projections=integer(1), generator=generator),
        is_finite,
    ),
    "fgsm": Row(
        fgsm,
        lambda: dict(forward=NET, images=IMAGES, labels=LABELS, eps=0.25),
        attack,
        within,
        left_to_the_model=other_shape,
    ),
    "pgd": Row(
        pgd,
        lambda: dict(forward=NET, images=IMAGES, labels=LABELS, eps=0.25, steps=2),
        attack
        | dict(steps=integer(1, 9999), step_size=either(nothing, positive), random_start=flag, generator=generator),
        within,
        left_to_the_model=other_shape,
    ),
}

SURGERY = {
    "to_enc": Row(
        to_enc,
        lambda: dict(model=network()),
        enc_options
        | dict(
            model=lambda v: isinstance(v, nn.Module),
            include=either(nothing, one_of("*", [], ())),
            exclude=either(nothing, one_of("*", [], ())),
            post_norm=either(flag, one_of("auto")),
        ),
        names={"variant": "variant|layer", "alpha": "alpha"},
    ),
    "to_enc preserve": Row(_preserved, dict, dict(preserve=flag), lambda report, **_: len(report) == 1),
    "fold": Row(fold, lambda: dict(model=network()), dict(model=never)),
    "audit": Row(
        audit,
        lambda: dict(model=network(), inputs=torch.zeros(2, 3, 3, 3)),
        dict(model=never, folded=flag, inputs=either(nothing, tensor())),
    ),
    "ENCLinear": Row(_model("ENCLinear"), lambda: dict(in_features=4, out_features=3), layer),
    "ENCConv1d": Row(_model("ENCConv1d"), lambda: dict(in_channels=2, out_channels=3, kernel_size=3), layer),
    "ENCConv2d": Row(_model("ENCConv2d"), lambda: dict(in_channels=2, out_channels=3, kernel_size=3), layer),
    "ENCConv3d": Row(_model("ENCConv3d"), lambda: dict(in_channels=2, out_channels=3, kernel_size=3), layer),
    "param_groups_enc": Row(
        param_groups_enc,
        lambda: dict(model=network(), lr=0.1),
        dict(
            model=lambda v: isinstance(v, nn.Module),
            weight_decay=not_negative,
            lr=either(not_negative, nothing, tensor(lambda t: t.numel() == 1 and t.is_floating_point())),
            shift_eps=not_negative,
            lr_mult=not_negative,
            decay_mult=not_negative,
            bias_decay_mult=not_negative,
            norm_decay_mult=not_negative,
            custom_keys=one_of({}),
        ),
    ),
    "add_shift": Row(
        add_shift,
        lambda: dict(optimizer=_optimizer()),
        dict(optimizer=lambda v: isinstance(v, torch.optim.Optimizer), decoupled=either(flag, nothing)),
    ),
    "ENCOptimWrapperConstructor": Row(
        _constructor,
        lambda: dict(lr=0.1, weight_decay=1e-4),
        dict(
            lr=either(not_negative, tensor(lambda t: t.numel() == 1 and t.is_floating_point())),
            weight_decay=not_negative,
            shift_eps=not_negative,
            bias_lr_mult=not_negative,
            dwconv_decay_mult=not_negative,
            flat_decay_mult=not_negative,
            custom_keys=one_of({}),
            paramwise_cfg=either(nothing, one_of({})),
        ),
        names={"paramwise_cfg": "paramwise_cfg|parawise_cfg", "lr": "lr|learning rate|Tensor"},
    ),
}

PARTS = {
    "GBRHook": Row(
        _hook("GBRHook"),
        dict,
        dict(
            num_samples=either(nothing, integer(2)),
            batch_size=integer(1),
            projections=either(nothing, integer(1)),
            output=one_of("logits", "probs", "label_prob"),
            space=one_of("normalized", "pixel"),
            interval=integer(1),
            seed=integer(0, 2**32 - 1),
            by_epoch=either(flag, nothing),
            pipeline=lambda v: v is None or isinstance(v, (list, tuple)),
        ),
    ),
    "FGSMHook": Row(
        _hook("FGSMHook"),
        dict,
        dict(
            eps=pixel_eps,
            interval=integer(1),
            num_samples=either(nothing, integer(1)),
            batch_size=either(nothing, integer(1)),
        ),
    ),
    "ENCGuardHook": Row(_hook("ENCGuardHook"), dict, dict(data=flag, finite=flag)),
    "GBRPenalty": Row(
        _model("GBRPenalty"), lambda: dict(weight=0.1), dict(weight=not_negative, projections=integer(1))
    ),
    "DropBlock": Row(
        lambda **call: enc_plugin.models.DropBlock(**call),
        lambda: dict(drop_prob=0.1),
        dict(drop_prob=number(lambda v: 0 <= v < 1), block_size=lambda v: integer(1)(v) and v % 2 == 1),
    ),
    "DropBlockResNetCIFAR6n": Row(
        _drop_block,
        dict,
        dict(
            drop_prob=number(lambda v: 0 <= v < 1),
            block_size=lambda v: integer(1)(v) and v % 2 == 1,
            drop_stages=either(nothing, numbers(lambda v: all(integer(1, 3)(x) for x in v), single=False)),
        ),
    ),
    "ENCImageClassifier": Row(
        _classifier,
        dict,
        dict(
            enc=either(nothing, one_of({})),
            gbr_penalty=nothing,
            depth=one_of(8, 20, 32, 44, 56, 110),
        ),
        names={"enc": "enc|argument 'a'", "gbr_penalty": "gbr_penalty|argument 'a'|'weight'"},
    ),
    "Digits": Row(
        lambda **call: DATASETS.build(dict(type="Digits", **call)), dict, dict(split=one_of("train", "test"))
    ),
    "CIFAR10Folder": Row(
        lambda **call: DATASETS.build(dict(type="CIFAR10Folder", lazy_init=True, **call)),
        dict,
        dict(split=one_of("train", "test"), per_class=either(nothing, integer(1))),
    ),
    "timm.enc_resnet18": Row(
        lambda enc=None, **call: timm.create_model("enc_resnet18", num_classes=2, enc=enc, **call),
        dict,
        dict(enc=either(nothing, one_of({}))),
        names={"enc": "enc|argument 'a'"},
    ),
    "choose_samples": Row(
        choose_samples,
        lambda: dict(dataset=5, num_samples=3, seed=0),
        dict(num_samples=either(nothing, integer(1)), seed=integer(0, 2**32 - 1)),
        lambda chosen, **call: chosen == sorted(set(chosen)) and len(chosen) == min(5, call["num_samples"] or 5),
    ),
    "spread": Row(
        spread,
        lambda: dict(length=5, num_samples=3),
        dict(num_samples=either(nothing, integer(1))),
        lambda chosen, **call: chosen == sorted(set(chosen)) and len(chosen) == min(5, call["num_samples"] or 5),
    ),
    "FixedSamples": Row(
        lambda **call: FixedSamples(_Digits(), [], range(4), **call),
        lambda: dict(batch_size=2),
        dict(batch_size=integer(1)),
        lambda samples, **_: len(samples) == 4,
    ),
    "measure_robustness": Row(
        _robustness,
        lambda: dict(eps=[4]),
        dict(
            eps=pixel_eps,
            num_samples=either(nothing, integer(1)),
            batch_size=integer(1),
            pgd_steps=integer(0, 9999),
            seed=integer(0, 2**32 - 1),
        ),
        share,
    ),
}
ROWS = FUNCTIONAL | SURGERY | PARTS
ARGUMENTS = [(name, argument) for name, row in ROWS.items() for argument in row.admits]


@pytest.fixture(scope="module", autouse=True)
def _count(request):
    yield
    print(f"\nbad input: {sum(TRIED.values())} values tried ({dict(TRIED)}) on {len(ARGUMENTS)} arguments")


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=[f"{n}-{a}" for n, a in ARGUMENTS])
@settings(max_examples=25)
@given(value=ANYTHING)
def test_each_argument_ends_in_a_named_error_or_a_right_result(name, argument, value):
    row = ROWS[name]
    assume(not row.left_to_the_model(argument, value))
    call = row.good() | {argument: value}
    if row.admits[argument](value):
        TRIED["admitted"] += 1
        result = row.call(**call)
        assert row.check(result, **call) is not False
        return
    try:
        row.call(**call)
    except (ValueError, TypeError) as error:
        TRIED["refused"] += 1
        message = str(error)
    else:
        pytest.fail(f"{name}({argument}={value!r}) passed, which is not documented")
    words = row.names.get(argument, argument).split("|")
    assert any(word in message for word in words), f"the error does not name {argument}: {message}"
