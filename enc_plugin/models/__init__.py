"""mmpretrain parts, registered on mmengine's root registry so that every scope finds them.

With mmengine alone the ENC layers are registered, for ``conv_cfg`` of its other libraries; the other parts are built on
mmpretrain's classes, and asking for one of them raises an error that names the extra.
"""

from ..installation import needs_mmengine  # noqa: F401

# isort: split
from mmengine.registry import MODELS

from ..installation import is_installed, require
from ..layers import ENC_LAYERS

for _layer in ENC_LAYERS.values():
    MODELS.register_module(module=_layer)

if is_installed("mmpretrain"):
    from .backbones import ResNetCIFAR6n
    from .baselines import BNLinearClsHead, DropoutLinearClsHead, WNConv2d
    from .classifier import ENCImageClassifier
    from .dropblock import DropBlock, DropBlockResNet, DropBlockResNetCIFAR6n, DropBlockScheduleHook
    from .gbr_penalty import GBRImageClassifier, GBRPenalty

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
