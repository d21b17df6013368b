"""Models and their parts, registered on mmengine's root registry, where every scope finds them.

Without mmpretrain, only the layers and the penalty are registered. The other parts subclass mmpretrain's classes;
accessing one raises an error that says what to install.
"""

from ..installation import needs_mmengine  # noqa: F401

# isort: split
from mmengine.registry import MODELS

from ..installation import is_installed, require
from ..layers import ENC_LAYERS
from .gbr_penalty import GBRPenalty
from .weight_norm import WNConv2d

for _layer in ENC_LAYERS.values():
    MODELS.register_module(module=_layer)

if is_installed("mmpretrain"):
    from .backbones import ResNetCIFAR6n
    from .classifier import ENCImageClassifier, GBRImageClassifier
    from .dropblock import DropBlock, DropBlockResNet, DropBlockResNetCIFAR6n, DropBlockScheduleHook
    from .heads import BNLinearClsHead, DropoutLinearClsHead

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


def __getattr__(name: str):
    if name in __all__:
        require("mmpretrain")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
