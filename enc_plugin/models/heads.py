"""Classification heads with dropout before the linear layer, or with a batch norm behind it."""

from __future__ import annotations

from mmengine.registry import MODELS
from mmpretrain.models.heads import LinearClsHead
from torch import Tensor, nn


@MODELS.register_module()
class DropoutLinearClsHead(LinearClsHead):
    """``LinearClsHead`` with dropout on its input, where no batch norm follows whose statistics it would shift.

    Args:
        *args, **kwargs: As for ``LinearClsHead``.
        dropout: Probability that a feature is dropped in training, 0 to 1.
    """

    def __init__(self, *args, dropout: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.dropout = nn.Dropout(dropout)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Features of the last stage after dropout, ``(N, in_channels)``."""
        return self.dropout(super().pre_logits(feats))


@MODELS.register_module()
class BNLinearClsHead(LinearClsHead):
    """``LinearClsHead`` with a batch norm on its logits, as ENC adds it, but without ENC.

    This baseline separates the effect of the constraint from that of the batch norm that it needs. The batch norm draws
    no random numbers, so the other weights are initialised as with ``LinearClsHead``.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm1d(self.num_classes)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Logits ``(N, num_classes)``."""
        return self.norm(super().forward(feats))
