"""mmpretrain parts, registered on mmengine's root registry so that every scope finds them."""

from mmengine.registry import MODELS

from ..layers import ENC_LAYERS
from .backbones import ResNetCIFAR6n
from .classifier import ENCImageClassifier

for _layer in ENC_LAYERS.values():
    MODELS.register_module(module=_layer)

__all__ = ["ENCImageClassifier", "ResNetCIFAR6n"]
