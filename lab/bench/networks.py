"""The networks of the benchmarks."""

from __future__ import annotations

from mmengine.hub import get_config
from mmpretrain.models import build_classifier
from mmpretrain.registry import MODELS
from torch import nn

import enc_plugin  # noqa: F401  (registers ResNetCIFAR6n)


def classifier(backbone: str, channels: int, classes: int = 10, **options) -> nn.Module:
    """An mmpretrain classifier: a backbone with ``channels`` output maps, average pooling, and a linear layer."""
    return build_classifier(
        dict(
            type="ImageClassifier",
            backbone=dict(type=backbone, **options),
            neck=dict(type="GlobalAveragePooling"),
            head=dict(type="LinearClsHead", num_classes=classes, in_channels=channels),
        )
    )


def resnet18() -> nn.Module:
    """ResNet-18 for 32 x 32 images."""
    return classifier("ResNet_CIFAR", 512, depth=18)


def resnet20(classes: int = 10) -> nn.Module:
    """ResNet-20 for 32 x 32 images."""
    return classifier("ResNetCIFAR6n", 64, classes, depth=20)


def resnet50() -> nn.Module:
    """mmpretrain's ResNet-50 for 1000 classes."""
    return MODELS.build(get_config("mmpretrain::resnet/resnet50_8xb32_in1k.py").model)
