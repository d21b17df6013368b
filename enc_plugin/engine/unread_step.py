"""An optimizer step that goes ahead before the host has read whether its gradients are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class UnreadStep:
    """A step that is about to be taken: the largest magnitude of its gradients, and what undoes the step.

    Reading a number from an accelerator makes the host wait for all that it has launched. So the step is taken first,
    and :meth:`is_finite` is asked later, where the host waits anyway. Until then the weights and gradients from before
    the step stay in memory; there is room for them, because after the backward pass the activations are gone.

    Args:
        parameters: Parameters of the optimizer; those without a gradient are left out.
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
        """Whether all gradients were; waits for the device."""
        return self._largest is None or math.isfinite(self._largest.item())

    @torch.no_grad()
    def undo(self) -> None:
        """Put back the weights and gradients of before the step; the optimizer's own state stays as it is."""
        if self._before:
            torch._foreach_copy_(self._parameters, self._before)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient


@torch.no_grad()
def largest_magnitude(tensors: Iterable[Tensor | None]) -> Tensor | None:
    """Largest magnitude of all elements, a scalar on the device: NaN if one is; None if there are no elements."""
    tensors = [t for t in tensors if t is not None and t.numel()]
    # Not a sum of squares, which overflows where the values do not. NaN passes through the maximum.
    return torch.nn.utils.get_total_norm(tensors, math.inf) if tensors else None
