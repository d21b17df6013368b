"""The Triton kernels of the weights, run by Triton's interpreter on a CPU."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

pytest.importorskip("triton")


def check_rows() -> None:
    """Against the operations of torch: results, gradients of weights and of a learnable alpha, a layer without one."""
    from enc_plugin.functional import grouped
    from enc_plugin.kernels import triton_layers, triton_rows, triton_weights

    triton_rows._BLOCK = triton_layers._BLOCK = 64  # rows of less and of more than a block
    triton_layers._CHUNK = 128
    for variant, dtype in itertools.product(grouped.GROUPED, (torch.float32, torch.bfloat16)):
        torch.manual_seed(0)
        shapes = [(3, 3, 3, 3), (2, 150), (2, 4, 1, 1), (2, 5, 3, 3), (2, 2, 2, 2, 2)]
        weights = [(torch.randn(shape) + 0.2).requires_grad_() for shape in shapes]
        weights[3] = weights[3].detach().to(memory_format=torch.channels_last).requires_grad_()
        alphas = [1.0, torch.tensor(2.0, requires_grad=True), 1.0, 0.5, 1.0]
        table = triton_weights.table_of(weights, variant, dtype)
        assert table is triton_weights.table_of(weights, variant, dtype)
        found = []
        for compute in (partial(triton_weights.triton_weights, table), grouped.enc_weights):
            whats = compute(weights, variant, alphas, dtype)
            with torch.no_grad():
                torch.testing.assert_close(compute(weights, variant, alphas, dtype), [x.detach() for x in whats])
            assert all(what.stride() == weight.stride() for what, weight in zip(whats, weights, strict=True))
            inputs = [*weights[:2], weights[3], alphas[1]]
            directions = [weight.detach().cos().to(dtype).contiguous() for weight in weights]
            used = (0, 1, 3)
            gradients = torch.autograd.grad([whats[i] for i in used], inputs, [directions[i] for i in used])
            (unused,) = torch.autograd.grad(whats[0].sum() * 0, weights[2], allow_unused=True, retain_graph=True)
            assert unused is None
            found.append([x.detach() for x in (*whats, *gradients)])
        rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(*found, rtol=rtol, atol=1e-6)
    table = triton_weights.table_of(weights, "ws", torch.float32)
    (what, *_) = triton_weights.triton_weights(table, weights, "ws", [1.0] * 5, torch.float32)
    (first,) = torch.autograd.grad(what.pow(3).sum(), weights[0], create_graph=True)
    assert torch.autograd.grad(first.square().sum(), weights[0])[0].isfinite().all()


class Elsewhere(torch.Tensor):
    """A kind of tensor that might keep its values elsewhere."""


def check_default_dtype() -> None:
    """The default dtype is not that of the weights."""
    from enc_plugin.kernels import triton_weights

    triton_weights._is_right.clear()
    torch.set_default_dtype(torch.float64)
    for variant in ("ws", "fro"):
        weight = torch.randn(2, 5, dtype=torch.float32, requires_grad=True)
        table = triton_weights.table_of([weight], variant, torch.float32)
        (what,) = triton_weights.triton_weights(table, [weight], variant, [1.0], torch.float32)
        (gradient,) = torch.autograd.grad(what.pow(3).sum(), weight)
        assert what.dtype == gradient.dtype == torch.float32
    torch.set_default_dtype(torch.float32)


def check_trial() -> None:
    """Kernels that are wrong, or that do not run, are not used, with a warning; the weights do not matter."""
    from enc_plugin.kernels import triton_weights

    def fail(*args):
        raise RuntimeError("no compiler")

    def wrong(*args):
        return [1.001 * what for what in right(*args)]

    def table_of(size: float, dtype: torch.dtype = torch.bfloat16):
        return triton_weights.table_of([size * torch.ones(2, 5)], "ws", dtype)

    # Weights that are small, constant or NaN have gradients that vanish: no reason to distrust the kernels.
    for size in (0.0, 1e-6, math.nan):
        triton_weights._is_right.clear()
        assert table_of(size) is not None
    assert triton_weights.table_of([torch.ones(2, 5)], "unknown", torch.float32) is None
    assert triton_weights.table_of([torch.ones(2, 5).double()], "ws", torch.float32) is None
    assert triton_weights.table_of([torch.ones(5, 2).T], "ws", torch.float32) is None
    assert triton_weights.table_of([torch.ones(2, 5).as_subclass(Elsewhere)], "ws", torch.float32) is None
    right = triton_weights.triton_weights
    for kernels, reason in ((wrong, "their results differ from torch's by a relative 1.0e-03"), (fail, "no compiler")):
        triton_weights._is_right.clear()
        triton_weights.triton_weights = kernels
        with pytest.warns(UserWarning, match=reason):
            assert table_of(1.0, torch.float32) is None
        assert table_of(1.0, torch.float32) is None  # without another warning
    triton_weights._is_right.clear()


def test_kernels_equal_the_operations_of_torch():
    subprocess.run([sys.executable, __file__], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


if __name__ == "__main__":
    check_rows()
    check_default_dtype()
    check_trial()
