"""Classification heads that mmpretrain lacks: with dropout before the classifier, and with a batch norm behind it."""

from __future__ import annotations

from mmengine.registry import MODELS
from mmpretrain.models.heads import LinearClsHead
from torch import Tensor, nn


@MODELS.register_module()
class DropoutLinearClsHead(LinearClsHead):
    """``LinearClsHead`` with dropout on its input: behind the last batch norm, where it shifts no statistics.

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
    """``LinearClsHead`` with a batch norm on its logits: what ENC adds to a classifier, without ENC.

    The control that tells the constraint from the batch norm that it needs. It starts at weight 1 and bias 0, and draws
    no random numbers, so that the other weights start as those of ``LinearClsHead``.

    Args:
        *args, **kwargs: As for ``LinearClsHead``.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm1d(self.num_classes)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Logits ``(N, num_classes)``."""
        return self.norm(super().forward(feats))
