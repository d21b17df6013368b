"""GBR as a term of the training loss, as a baseline for ENC; the paper calls this direct optimisation too costly."""

from __future__ import annotations

from mmengine.registry import MODELS
from torch import Tensor

from ..functional.checks import check_integer, check_not_negative
from ..functional.penalty import gbr_penalty


@MODELS.register_module()
class GBRPenalty:
    r"""Loss term ``weight * GBR``, with the GBR (eq. 2) estimated on the training batch.

    With one projection, a training step takes about twice as long, because a backward pass to the inputs is
    differentiated.

    Args:
        weight: Factor of the GBR, at least 0. There is no factor of 1/2.
        projections: Number of random orthonormal output directions for each sample, at least 1. The estimate is exact
            if it is at least the number of classes.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(self, weight: float, projections: int = 1):
        check_not_negative("weight", weight)
        check_integer("projections", projections, 1)
        self.weight = weight
        self.projections = projections

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Differentiable scalar penalty, for inputs that require grad and outputs ``(N, C)`` computed from them."""
        return self.weight * gbr_penalty(inputs, outputs, projections=self.projections)

    def __repr__(self) -> str:
        return f"GBRPenalty(weight={self.weight}, projections={self.projections})"
