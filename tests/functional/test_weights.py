"""Eq. 20-23 against their literal float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import TORCH
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from enc_plugin.functional import VARIANTS, enc_weight

ALL = tuple(VARIANTS)


def literal(weight: Tensor, variant: str, alpha: float = 1.0) -> Tensor:
    """Eq. 20-23 as they are written, row by row."""
    w = weight.flatten(1)
    m, n = w.shape
    if variant == "fro":
        what = alpha**0.5 * w / (w**2).sum().sqrt()
    elif variant == "wn":
        what = torch.stack([(alpha / m) ** 0.5 * row / (row**2).sum().sqrt() for row in w])
    elif variant == "ws":
        rows = []
        for row in w:
            centered = row - row.sum() / n
            rows.append((alpha / (m * n)) ** 0.5 * centered / ((centered**2).sum() / n).sqrt())
        what = torch.stack(rows)
    else:
        centered = w - w.sum() / (m * n)
        what = alpha**0.5 * centered / (centered**2).sum().sqrt()
    return what.view_as(weight)


shapes = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(2, 9)),
    st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(2, 4)),
    st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(2, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 3), st.integers(1, 3), st.integers(1, 2)),
)


def random_weight(shape: tuple[int, ...], seed: int, offset: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator) + offset


@given(shapes, st.sampled_from(ALL), st.floats(0.05, 20), st.integers(0, 2**31))
def test_equals_the_literal_formula(shape, variant, alpha, seed):
    weight = random_weight(shape, seed)
    torch.testing.assert_close(enc_weight(weight, variant, alpha), literal(weight, variant, alpha))
    single = enc_weight(weight.float(), variant, alpha)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), literal(weight.float().double(), variant, alpha), rtol=2e-4, atol=1e-5)


@given(shapes, st.sampled_from(ALL), st.floats(-15, 15), st.integers(0, 2**31))
def test_squared_norm_is_alpha_at_any_scale(shape, variant, exponent, seed):
    weight = (random_weight(shape, seed) * 10.0**exponent).float()
    assert enc_weight(weight, variant, 2.5).double().square().sum().item() == pytest.approx(2.5, rel=2e-6)


@given(shapes, st.sampled_from(ALL), st.floats(-15, 15), st.integers(0, 2**31))
def test_gradient_is_right_and_finite_at_any_scale(shape, variant, exponent, seed):
    scale = 10.0**exponent
    weight, upstream = (random_weight(shape, seed) * scale).float(), random_weight(shape, seed + 1).float()
    free = weight.clone().requires_grad_()
    (grad,) = torch.autograd.grad(enc_weight(free, variant), free, upstream)
    exact = weight.double().requires_grad_()
    (expected,) = torch.autograd.grad(literal(exact, variant), exact, upstream.double())
    assert grad.isfinite().all()
    # Rows of two elements have a zero gradient under 'ws': compare with what cancels, not with what is left.
    size = (upstream.double().abs().max() / exact.detach().abs().max()).item()
    torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-3 * size)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3), (4, 3, 2, 2), (2, 2, 2, 2, 2)])
def test_derivatives_forward_and_backward_once_and_twice(variant, shape):
    weight = random_weight(shape, 0).requires_grad_()
    alpha = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, a: enc_weight(w, variant, a), (weight, alpha), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda w: enc_weight(w, variant), (weight,), check_fwd_over_rev=True)


@pytest.mark.parametrize("variant", ["wn", "ws"])
def test_rows_have_equal_norm(variant):
    rows = enc_weight(random_weight((6, 3, 3, 3), 1), variant, 3.0).flatten(1)
    torch.testing.assert_close(rows.square().sum(1), torch.full((6,), 0.5, dtype=torch.float64))


def test_centered_variants_have_zero_mean():
    weight = random_weight((6, 3, 3, 3), 1, offset=5.0)
    assert enc_weight(weight, "ws").flatten(1).mean(1).abs().max() < 1e-12
    assert enc_weight(weight, "centered_fro").mean().abs() < 1e-12


@pytest.mark.parametrize("variant", ALL)
def test_scale_of_the_free_weight_does_not_matter(variant):
    weight = random_weight((4, 7), 2)
    torch.testing.assert_close(enc_weight(weight, variant), enc_weight(1234.5 * weight, variant))


@pytest.mark.parametrize("variant", ALL)
def test_a_mask_that_keeps_all_changes_nothing_in_float64(variant):
    weight = random_weight((3, 5), 2)
    found = enc_weight(weight, variant, 2.5, torch.ones(3, 5))
    torch.testing.assert_close(found, enc_weight(weight, variant, 2.5), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_in_float32(variant, dtype):
    weight = random_weight((8, 16, 3, 3), 3).to(dtype)
    what = enc_weight(weight, variant)
    assert what.dtype == dtype
    assert torch.equal(what, enc_weight(weight.float(), variant).to(dtype))


@pytest.mark.parametrize("variant", ALL)
def test_autocast_does_not_lower_the_statistics(variant):
    weight = random_weight((8, 16, 3, 3), 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = enc_weight(weight, variant)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, enc_weight(weight, variant))


@pytest.mark.parametrize("variant", ALL)
def test_memory_layout_does_not_matter(variant):
    weight = random_weight((8, 4, 3, 3), 4)
    assert torch.equal(enc_weight(weight.to(memory_format=torch.channels_last), variant), enc_weight(weight, variant))
    matrix = weight.flatten(1)
    assert torch.equal(enc_weight(matrix.t().contiguous().t(), variant), enc_weight(matrix, variant))


# Operations on whole weights, forward and backward, of the equations that have been made cheap.
KERNELS = {
    "fro": ["linalg_vector_norm", "mul", "mul", "sum", "mul", "addcmul_"],
    "wn": ["_weight_norm_interface", "_weight_norm_interface_backward"],
    "ws": ["native_group_norm", "native_group_norm_backward"],
    "centered_fro": ["native_group_norm", "native_group_norm_backward"],
}


@pytest.mark.parametrize("variant", KERNELS)
def test_backward_keeps_the_free_weight_and_row_statistics_alone(variant):
    weight = random_weight((32, 16, 3, 3), 5).float().requires_grad_()
    kept = {}  # elements by storage: what is kept twice counts once

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        enc_weight(weight, variant)
    assert kept.pop(weight.untyped_storage().data_ptr()) == weight.numel()
    assert sum(kept.values()) <= 4 * weight.shape[0]


@pytest.mark.parametrize("variant", KERNELS)
def test_few_kernels_touch_a_whole_weight(variant):
    if TORCH < (2, 7):
        pytest.skip("the kernels that torch 2.6 takes for 'fro' are others")
    weight = random_weight((32, 16, 3, 3), 5).float().requires_grad_()
    upstream = torch.ones_like(weight)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        enc_weight(weight, variant).backward(upstream)
    names = [
        event.name.removeprefix("aten::")
        for event in profile.events()
        if event.name.startswith("aten::")
        and any(math.prod(shape or [0]) == weight.numel() for shape in event.input_shapes)
    ]
    free = {"flatten", "view", "reshape", "unsqueeze", "as_strided", "expand", "detach", "to", "resolve_conj"}
    free |= {"new_full", "new_empty", "empty_like", "matmul", "group_norm"}  # allocations, and wrappers of others
    kernels = [name for name in names if name not in free]
    assert kernels == KERNELS[variant]


def compiled_enc_weight():
    torch._dynamo.reset()
    return torch.compile(enc_weight, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize(
    ("dtype", "shape", "alpha"),
    [
        (torch.float64, (6, 5), "tensor"),
        (torch.float64, (4, 3, 3, 2), 2.0),
        (torch.float32, (4, 3, 3, 2), "tensor"),
        (torch.bfloat16, (4, 3, 3, 2), 2.0),
    ],
)
def test_compiled_equals_eager_with_its_gradients(variant, dtype, shape, alpha):
    compiled = compiled_enc_weight()
    upstream = random_weight(shape, seed=1).to(dtype)
    found = []
    for call in (compiled, enc_weight):
        weight = random_weight(shape, seed=0).to(dtype).requires_grad_()
        factor = torch.tensor([2.0], requires_grad=True) if alpha == "tensor" else alpha
        what = call(weight, variant, factor)
        assert what.dtype == dtype
        inputs = (weight, factor) if alpha == "tensor" else (weight,)
        found.append([what, *torch.autograd.grad(what, inputs, upstream)])
    rtol = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.6e-2}[dtype]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("variant", ALL)
def test_compiled_holds_the_norm_at_any_scale(variant):
    compiled = compiled_enc_weight()
    for scale in (1e-15, 1e15):
        weight = (scale * random_weight((8, 64, 3, 3), seed=0)).float().requires_grad_()
        what = compiled(weight, variant)
        assert what.double().square().sum().item() == pytest.approx(1.0, rel=1e-5)
        assert torch.autograd.grad(what, weight, torch.ones_like(what))[0].isfinite().all()


@pytest.mark.parametrize("way", ["eager", "compiled", "pruned"])
@pytest.mark.parametrize("variant", ["fro", "centered_fro"])
def test_the_largest_layers_are_as_exact_as_small_ones(variant, way):
    generator = torch.Generator().manual_seed(0)
    weight, upstream = (torch.randn(2048, 2048, generator=generator) for _ in range(2))
    kept = weight > -1 if way == "pruned" else None
    free = weight.clone().requires_grad_()
    what = (compiled_enc_weight() if way == "compiled" else enc_weight)(free, variant, 1.0, kept)
    assert what.double().square().sum().item() == pytest.approx(1.0, rel=2e-6)
    (grad,) = torch.autograd.grad(what, free, upstream)
    exact = weight.double().requires_grad_()
    (expected,) = torch.autograd.grad(enc_weight(exact, variant, 1.0, kept), exact, upstream.double())
    assert ((grad - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("variant", ["ws", "centered_fro"])
def test_rows_of_one_element_are_an_error_of_its_own(variant):
    with pytest.raises(ValueError, match="expected rows of at least two elements"):
        enc_weight(torch.randn(4 if variant == "ws" else 1, 1), variant)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 2), "l2"), "variant: expected one of 'fro', 'wn', 'ws', 'centered_fro', got 'l2'"),
        ((torch.ones(4), "ws"), r"weight: expected \(out, in\).*got shape \(4,\)"),
        ((torch.ones(2, 2), "ws", 0.0), "alpha: expected a positive finite number, got 0.0"),
        ((torch.ones(2, 2), "ws", -1), "alpha: expected a positive"),
        ((torch.ones(2, 2), "ws", float("nan")), "alpha: expected a positive"),
        ((torch.ones(2, 2), "ws", float("inf")), "alpha: expected a positive"),
        ((torch.ones(2, 2), "ws", torch.ones(3)), "alpha: expected a number or a tensor of one element"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        enc_weight(*arguments)
