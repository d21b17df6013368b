"""GBR as a term of the training loss: the direct optimisation that the paper calls too costly, to compare ENC with."""

from __future__ import annotations

import math

from mmengine.registry import MODELS
from mmpretrain.models.classifiers import ImageClassifier
from torch import Tensor

from ..functional.checks import check_integer, check_number, check_type
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


@MODELS.register_module()
class GBRImageClassifier(ImageClassifier):
    """``ImageClassifier`` that can add a :class:`GBRPenalty` on its logits to the loss, logged as ``loss_gbr``.

    x is the normalised input. In train mode batch norms couple the samples of a batch; the penalty is on what training
    computes, so that one forward pass serves both. Without activation checkpointing only.

    Args:
        *args, **kwargs: As for mmpretrain's ``ImageClassifier``.
        gbr_penalty: Options of :class:`GBRPenalty`; None: no penalty, and training is the stock one.
    """

    def __init__(self, *args, gbr_penalty: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        check_type("gbr_penalty", gbr_penalty, (dict, type(None)), "a dict of options or None")
        self.gbr_penalty = None if gbr_penalty is None else GBRPenalty(**gbr_penalty)

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """The head's losses, and ``loss_gbr``."""
        if self.gbr_penalty is None:
            return super().loss(inputs, data_samples)
        inputs = inputs.detach().requires_grad_()
        logits: list[Tensor] = []
        # The head's own loss computes the logits: a second pass would update its batch norm twice.
        handle = self.head.register_forward_hook(lambda head, args, out: logits.append(out))
        try:
            losses = super().loss(inputs, data_samples)
        finally:
            handle.remove()
        if len(logits) != 1 or not isinstance(logits[0], Tensor):
            raise TypeError(
                f"gbr_penalty: expected {type(self.head).__name__} to compute one tensor of logits for its loss, got "
                f"{[type(x).__name__ for x in logits]}; use a head like LinearClsHead"
            )
        losses["loss_gbr"] = self.gbr_penalty(inputs, logits[0])
        return losses
