"""The ENC classifier around stock networks that are more than their forward pass."""

import copy
import warnings

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

LEVIT = dict(
    backbone=dict(type="LeViT", arch="128s"),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LeViTClsHead", num_classes=10, in_channels=384, distillation=False),
)


def build(kind, **options):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return MODELS.build(dict(type=kind, **copy.deepcopy(LEVIT), **options))


def test_a_network_that_prepares_for_eval_mode_is_recorded_and_preserved():
    """LeViT's attention has biases for eval mode once ``eval()`` was called."""
    plain = build("ImageClassifier")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "to_enc could not run the network")
        model = build("ENCImageClassifier", enc=dict(variant="wn", preserve=True))
        assert all(module.training for module in model.modules())
        model.head.eval()
        modes = [module.training for module in model.modules()]
        model.load_state_dict(plain.state_dict(), strict=False)
    assert [module.training for module in model.modules()] == modes
    inputs = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, found = plain.eval()(inputs), model.eval()(inputs)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
