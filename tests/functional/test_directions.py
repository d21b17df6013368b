"""Random output directions are orthonormal and uniform."""

import pytest
import torch

from enc_plugin.functional.directions import drawn_frames, orthonormal


def test_a_full_random_frame_is_exact_too():
    frame = orthonormal(6, 6, seed=3)
    torch.testing.assert_close(frame @ frame.T, torch.eye(6, dtype=torch.float64))
    jacobian = torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close((frame @ jacobian).square().sum(), jacobian.square().sum())


@pytest.mark.parametrize("projections", [1, 3])
def test_directions_drawn_for_a_batch_are_orthonormal_and_point_everywhere_alike(projections):
    """What a GPU draws; E[v v^T] = 1 / C is what makes the estimate unbiased."""
    generator = torch.Generator().manual_seed(0)
    count, size = 20_000, 5
    frames = drawn_frames(torch.zeros(count, size).double(), projections, generator, torch.device("cpu"))
    assert frames.shape == (projections, count, size)
    gram = torch.einsum("pnc,qnc->npq", frames, frames)
    torch.testing.assert_close(gram, torch.eye(projections).double().expand_as(gram), rtol=0, atol=1e-6)
    for one in frames:
        torch.testing.assert_close(one.T @ one / count, torch.eye(size).double() / size, rtol=0, atol=5e-3)
