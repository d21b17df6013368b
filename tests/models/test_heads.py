"""Heads that mmpretrain lacks, against closed forms."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS

from enc_plugin.models import DropoutLinearClsHead


def test_dropout_head_drops_in_training_and_not_in_evaluation():
    head = MODELS.build(dict(type="DropoutLinearClsHead", num_classes=4, in_channels=1000, dropout=0.2))
    assert isinstance(head, DropoutLinearClsHead)
    features = torch.ones(8, 1000)
    dropped = head.pre_logits((features,))
    assert abs((dropped == 0).float().mean().item() - 0.2) < 0.02
    assert dropped.max().item() == pytest.approx(1 / 0.8)
    assert torch.equal(head.eval().pre_logits((features,)), features)
    assert list(head.state_dict()) == ["fc.weight", "fc.bias"]
