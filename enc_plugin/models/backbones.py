"""Backbones that mmpretrain lacks."""

from __future__ import annotations

from mmengine.registry import MODELS
from mmpretrain.models.backbones import ResNet_CIFAR
from mmpretrain.models.backbones.resnet import BasicBlock


@MODELS.register_module()
class ResNetCIFAR6n(ResNet_CIFAR):
    """The three-stage CIFAR ResNets of He et al. (2016), section 4.2: ResNet-20, 32, 44, 56, 110.

    mmpretrain's ``ResNet_CIFAR`` has only the four-stage ImageNet depths. The stages here have 16, 32 and 64 channels;
    shortcuts that change shape are 1x1 convolutions (option B).

    Args:
        depth: 6n + 2 for n basic blocks per stage: 8, 20, 32, 44, 56 or 110.
        **kwargs: As for ``ResNet_CIFAR``: ``conv_cfg``, ``norm_cfg``, ``zero_init_residual``, ...

    Raises:
        ValueError: If ``depth`` is not one of these.
    """

    arch_settings = {6 * n + 2: (BasicBlock, (n, n, n)) for n in (1, 3, 5, 7, 9, 18)}

    def __init__(self, depth: int = 20, **kwargs):
        kwargs = {
            "num_stages": 3,
            "strides": (1, 2, 2),
            "dilations": (1, 1, 1),
            "out_indices": (2,),
            "stem_channels": 16,
            "base_channels": 16,
        } | kwargs
        if not isinstance(depth, int) or depth not in self.arch_settings:
            raise ValueError(f"depth: expected one of {', '.join(map(str, self.arch_settings))}, got {depth!r}")
        super().__init__(depth, **kwargs)
