"""GBR as a differentiable term of a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_floating_tensor, check_integer, check_type
from .directions import UnitVectors, drawn_frames, seeded_directions
from .precision import at_least_float32


def gbr_penalty(
    inputs: Tensor, outputs: Tensor, *, projections: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    r"""Estimate of the mean GBR of a batch, differentiable with respect to the parameters.

    Adding it to the loss optimises the GBR (eq. 2) directly. The paper calls that too costly, because each projection
    is a backward pass that is itself differentiated. A batch norm in train mode makes samples depend on each other; the
    estimate is then of the Jacobian of all outputs of the batch.

    Args:
        inputs: Samples x, ``(N, ...)``, from which ``outputs`` were computed; they require grad.
        outputs: ``(N, C)``, with their graph.
        projections: Number of random orthonormal directions for each sample.
        generator: Generator of the directions, on any device. None: torch's global one of the device of ``outputs``. A
            generator on a GPU avoids a synchronization.

    Returns:
        Scalar with a graph, float32 or float64. Not halved.

    Raises:
        ValueError: If ``inputs`` or ``outputs`` are empty or have no graph, or ``projections`` is below 1.
        TypeError: If an argument has the wrong type.

    Example:
        >>> x, weight = torch.zeros(3, 2, requires_grad=True), torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> gbr_penalty(x, x @ weight.T)
        tensor(5., grad_fn=<DivBackward0>)
    """
    for name, tensor in (("inputs", inputs), ("outputs", outputs)):
        check_floating_tensor(name, tensor)
        if not tensor.requires_grad:
            raise ValueError(f"{name}: expected a tensor that requires grad, got one that does not")
        if tensor.ndim == 0 or not len(tensor):
            raise ValueError(f"{name}: expected at least one sample, got shape {tuple(tensor.shape)}")
    check_integer("projections", projections, 1)
    check_type("generator", generator, (torch.Generator, type(None)), "a torch.Generator or None")
    outputs = outputs.flatten(1)
    count, size = outputs.shape
    device = outputs.device if generator is None else generator.device
    if device.type == "cpu":
        seeds = torch.randint(2**32, (count,), generator=generator, device="cpu").tolist()
        directions, scale = seeded_directions(size, projections, seeds, outputs)
    elif projections < size:
        directions, scale = drawn_frames(outputs, projections, generator, device), size / projections
    else:
        directions, scale = UnitVectors(outputs), 1.0
    total: Any = 0.0
    for direction in directions:
        (gradient,) = torch.autograd.grad(outputs, inputs, direction, create_graph=True)
        total = total + gradient.to(at_least_float32(gradient.dtype)).square().sum()
    return total * scale / count
