"""Gaussian noise on training inputs, the plainest way to a function that changes little with its input."""

from __future__ import annotations

import torch
from mmpretrain.registry import BATCH_AUGMENTS
from torch import Tensor


@BATCH_AUGMENTS.register_module()
class GaussianNoise:
    """Batch augmentation of mmpretrain that adds independent noise to every pixel and leaves the labels.

    Args:
        std: Standard deviation of the noise, in standard deviations of the normalised input.
    """

    def __init__(self, std: float):
        self.std = std

    def __call__(self, inputs: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs ``(N, C, H, W)`` with noise, and scores ``(N, classes)`` as they are, in floating point."""
        return inputs + self.std * torch.randn_like(inputs), scores.float()
