"""Optimizer steps that are taken before the host knows whether their gradients are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class UnreadStep:
    """A step whose gradients can be checked, and which can be undone, after it was taken. Create it before the step.

    Reading a number from an accelerator makes the host wait for all work that it has launched. So the step is taken
    first, and :meth:`is_finite` is called later, when the host waits anyway. Until then, weights and gradients from
    before the step stay in memory, where the activations have been freed after the backward pass.

    Args:
        parameters: Parameters of the optimizer; those without a gradient are ignored.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self._parameters = [p for p in parameters if p.grad is not None]
        self._gradients = [p.grad for p in self._parameters]
        self._largest = largest_magnitude(self._gradients)
        self._before = [torch.empty_like(p, requires_grad=False) for p in self._parameters]
        if self._before:
            with torch.no_grad():
                torch._foreach_copy_(self._before, self._parameters)

    def is_finite(self) -> bool:
        """Whether all gradients were finite; waits for the device."""
        return math.isfinite(self._largest.item())

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the weights and gradients from before the step, but not the state of the optimizer."""
        if self._before:
            torch._foreach_copy_(self._parameters, self._before)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient


@torch.no_grad()
def largest_magnitude(tensors: Iterable[Tensor | None]) -> Tensor:
    """Largest magnitude of all elements, as a scalar on the device; NaN if one is NaN, 0 if there are none."""
    # Unlike a sum of squares, the maximum cannot overflow.
    return torch.nn.utils.get_total_norm([t for t in tensors if t is not None and t.numel()], math.inf)
