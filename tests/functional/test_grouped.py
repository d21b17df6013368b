"""The weights of many layers at once are those that each layer computes on its own, and cost few operations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from functional.test_weights import ALL, literal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from enc_plugin.functional import enc_weight
from enc_plugin.functional.grouped import GROUPED, enc_weights

VIEWS = {
    "detach",
    "view",
    "as_strided",
    "alias",
    "split",
    "select",
    "slice",
    "unsqueeze",
    "expand",
    "_unsafe_view",
    "t",
}


class Operations(TorchDispatchMode):
    """Counts the operations that compute something: on a GPU, each is at least one launch of a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS and not name.startswith("empty"):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def free_weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Three lengths of rows, in all memory formats, contiguous or not."""
    torch.manual_seed(0)
    shapes = [(8, 3, 3, 3), (16, 4, 3, 3), (5, 36), (6, 36), (7, 9, 3), (8, 3, 3, 3), (4, 2, 3, 3, 2)]
    weights = [(torch.randn(shape, dtype=torch.float64) + 0.3).to(dtype) for shape in shapes]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    weights[3] = weights[3].t().contiguous().t()  # rows in pieces
    weights[6] = weights[6].to(memory_format=torch.channels_last_3d)
    return [weight.requires_grad_() for weight in weights]


@pytest.mark.parametrize("variant", GROUPED)
def test_they_equal_the_literal_formula_in_the_layout_of_the_weight(variant):
    weights = free_weights()
    alphas = [0.5 + i for i in range(len(weights))]
    for weight, what, alpha in zip(weights, enc_weights(weights, variant, alphas), alphas, strict=True):
        torch.testing.assert_close(what, literal(weight, variant, alpha))
        assert what.stride() == (weight.stride() if weight.ndim > 2 else what.contiguous().stride())


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("variant", ALL)
def test_first_and_second_derivatives_are_those_of_the_layers(variant, learnable):
    weights = free_weights()
    alphas = [torch.tensor(0.5 + i, requires_grad=True) if learnable and i % 2 else 0.5 + i for i in range(7)]
    inputs = weights + [alpha for alpha in alphas if isinstance(alpha, Tensor)]
    directions = [torch.randn_like(weight).contiguous() for weight in weights]  # not in the layout of the weights

    def derivatives(whats: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(whats, inputs, directions, create_graph=True)
        return first + torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    def own() -> list[Tensor]:
        return [enc_weight(weight, variant, alpha) for weight, alpha in zip(weights, alphas, strict=True)]

    torch.testing.assert_close(derivatives(enc_weights(weights, variant, alphas)), derivatives(own()))
    # The first ones without create_graph, which takes another way.
    once = torch.autograd.grad(enc_weights(weights, variant, alphas), inputs, directions)
    torch.testing.assert_close(once, torch.autograd.grad(own(), inputs, directions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ALL)
def test_a_cast_rounds_the_float32_weight_once(variant, dtype):
    weights = free_weights(dtype)
    for weight, what in zip(weights, enc_weights(weights, variant, [1.0] * 7, torch.bfloat16), strict=True):
        exact = enc_weight(weight.float(), variant)
        torch.testing.assert_close(what.float(), exact, rtol=2**-8, atol=0)
        assert what.dtype == torch.bfloat16


def test_a_weight_without_a_gradient_gets_none():
    weights = free_weights()
    whats = enc_weights(weights, "ws", [1.0] * 7)
    found = torch.autograd.grad(whats[0].pow(3).sum(), weights, allow_unused=True)
    assert [i for i, grad in enumerate(found) if grad is not None] == [0]


def test_outputs_without_a_common_layer_have_a_backward_pass_each():
    weights = free_weights()
    whats = enc_weights(weights, "ws", [1.0] * 7)
    whats[0].pow(3).sum().backward()
    whats[5].pow(3).sum().backward()  # of the same group
    torch.testing.assert_close(weights[5].grad, torch.autograd.grad(enc_weight(weights[5]).pow(3).sum(), weights[5])[0])


@pytest.mark.parametrize("mapped", [True, False])
def test_a_batch_of_gradients_is_mapped_over_also_of_a_learnable_alpha(mapped):
    inputs = [free_weights()[0], torch.tensor(2.0, dtype=torch.float64, requires_grad=True)]
    directions = torch.randn(5, *inputs[0].shape, dtype=torch.float64)

    def gradients(what: Tensor) -> tuple[Tensor, ...]:
        if mapped:
            return torch.func.vmap(lambda d: torch.autograd.grad(what, inputs, d, retain_graph=True))(directions)
        return torch.autograd.grad(what, inputs, directions, is_grads_batched=True)

    (together,), alone = enc_weights(inputs[:1], "ws", inputs[1:]), enc_weight(inputs[0], "ws", inputs[1])
    torch.testing.assert_close(gradients(together), gradients(alone))


def test_a_weight_that_changed_before_the_backward_pass_is_an_error():
    weights = free_weights()
    whats = enc_weights(weights, "ws", [1.0] * 7)
    with torch.no_grad():
        weights[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        whats[0].sum().backward()


@pytest.mark.parametrize("variant", GROUPED)
def test_operations_do_not_grow_with_the_number_of_layers(variant):
    def operations(number: int) -> int:
        torch.manual_seed(0)
        weights = [torch.randn(4, 6, requires_grad=True) for _ in range(number)]
        with Operations() as counted:
            whats = enc_weights(weights, variant, [1.0] * number, torch.bfloat16)
            torch.autograd.grad(whats, weights, [torch.ones_like(what) for what in whats])
        return counted.names.total() - counted.names["ones_like"] - counted.names["full"]

    operations(2), operations(20)  # constants are kept
    bound = 8 if variant in ("ws", "wn") else 28
    assert operations(2) == operations(20) <= bound
