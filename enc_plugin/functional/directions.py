"""Output directions along which the Jacobian is taken: all unit vectors, or random orthonormal vectors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def seeded_directions(
    size: int, projections: int | None, seeds: list[int] | None, like: Tensor
) -> tuple[UnitVectors | Tensor, float]:
    """Directions ``(P, N, C)``, and the factor of the sum of squares along them.

    All C unit vectors if ``projections`` is None or at least C = ``size``, else P = ``projections`` random orthonormal
    vectors for each sample, drawn from its seed.
    """
    if projections is None or projections >= size:
        return UnitVectors(like), 1.0
    frames = torch.stack([orthonormal(size, projections, seed) for seed in seeds or ()], 1)
    return frames.to(like), size / projections


def orthonormal(size: int, count: int, seed: int) -> Tensor:
    """``count`` uniformly random orthonormal vectors, ``(count, size)``, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(size, count, dtype=torch.float64, generator=generator, device="cpu")
    if count == 1:
        return (gaussian / gaussian.norm()).T
    return torch.linalg.qr(gaussian)[0].T


def drawn_frames(like: Tensor, projections: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Random directions as in :func:`seeded_directions`, drawn for the whole batch at once on ``device``."""
    gaussian = torch.randn(*like.shape, projections, generator=generator, device=device)
    frames = nn.functional.normalize(gaussian, dim=1) if projections == 1 else torch.linalg.qr(gaussian)[0]
    return frames.movedim(-1, 0).to(like)


class UnitVectors:
    """The C unit vectors of ``(N, C)`` outputs, the same for all samples, created one at a time to save memory."""

    def __init__(self, like: Tensor):
        self.like = like.detach()

    def __len__(self) -> int:
        return self.like.shape[1]

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(len(self)):
            unit = torch.zeros_like(self.like)
            unit[:, index] = 1
            yield unit
