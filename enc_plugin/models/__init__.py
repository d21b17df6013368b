"""mmpretrain parts, registered on mmengine's root registry so that every scope finds them."""

from mmengine.registry import MODELS

from ..layers import ENC_LAYERS
from .backbones import ResNetCIFAR6n
from .baselines import BNLinearClsHead, DropoutLinearClsHead, WNConv2d
from .classifier import ENCImageClassifier
from .dropblock import DropBlock, DropBlockResNet, DropBlockResNetCIFAR6n, DropBlockScheduleHook
from .gbr_penalty import GBRImageClassifier, GBRPenalty

for _layer in ENC_LAYERS.values():
    MODELS.register_module(module=_layer)

__all__ = [
    "BNLinearClsHead",
    "DropBlock",
    "DropBlockResNet",
    "DropBlockResNetCIFAR6n",
    "DropBlockScheduleHook",
    "DropoutLinearClsHead",
    "ENCImageClassifier",
    "GBRImageClassifier",
    "GBRPenalty",
    "ResNetCIFAR6n",
    "WNConv2d",
]
