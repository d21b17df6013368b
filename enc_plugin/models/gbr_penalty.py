"""GBR as a term of the training loss: the direct optimisation that the paper calls too costly, to compare ENC with."""

from __future__ import annotations

import math

from mmengine.registry import MODELS
from torch import Tensor

from ..functional.checks import check_integer, check_number
from ..functional.jacobian import gbr_penalty


@MODELS.register_module()
class GBRPenalty:
    r"""Loss term ``weight * GBR``, with the GBR estimated on the training batch (eq. 2).

    Each projection costs a backward pass to the inputs that is differentiated in turn: a training step takes about
    twice as long with one. Exact at ``projections`` >= number of classes.

    Args:
        weight: Factor of the GBR (which is not halved), not negative.
        projections: Random orthonormal output directions for each sample, at least 1.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(self, weight: float, projections: int = 1):
        check_number("weight", weight, "a finite number >= 0", lambda value: 0 <= value < math.inf)
        check_integer("projections", projections, 1)  # the number of classes is exact
        self.weight = weight
        self.projections = projections

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Scalar with a graph, for inputs that require grad and outputs ``(N, C)`` computed from them."""
        return self.weight * gbr_penalty(inputs, outputs, projections=self.projections)

    def __repr__(self) -> str:
        return f"GBRPenalty(weight={self.weight}, projections={self.projections})"
