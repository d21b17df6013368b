"""Equivalent-norm-constrained (ENC) training for torch, mmengine, mmpretrain and timm.

The layers, ``to_enc``, ``fold``, ``audit`` and the parameter groups need only torch. If mmengine and mmpretrain are
installed, importing the package registers all its parts with mmengine; in a config:
``custom_imports = dict(imports=['enc_plugin'])``.
"""

import importlib
import warnings

from .convert import to_enc
from .installation import check_stack, config_path, is_installed, is_verbose
from .layers import ENCConv1d, ENCConv2d, ENCConv3d, ENCLinear
from .layers.origin import CheckpointWarning
from .optim import add_projection, add_shift, param_groups_enc
from .surgery.audit import Audit, audit
from .surgery.conversion_report import ConversionReport, NoEffectWarning
from .surgery.fold import fold
from .version import __version__

__all__ = [
    "Audit",
    "CheckpointWarning",
    "ConversionReport",
    "ENCConv1d",
    "ENCConv2d",
    "ENCConv3d",
    "ENCLinear",
    "NoEffectWarning",
    "__version__",
    "add_projection",
    "add_shift",
    "audit",
    "config_path",
    "fold",
    "param_groups_enc",
    "to_enc",
]

_PARTS = {"engine": ("mmengine",), "models": ("mmengine",), "datasets": ("mmengine", "mmpretrain")}


def _register_parts() -> None:
    """Import the parts whose libraries are installed; errors of broken libraries pass through."""
    check_stack()
    with warnings.catch_warnings():
        # mmcv-lite warns about an operator that classification does not use.
        if not is_verbose():
            warnings.filterwarnings("ignore", "Fail to import ``MultiScaleDeformableAttention``", UserWarning)
        for part, packages in _PARTS.items():
            if all(map(is_installed, packages)):
                importlib.import_module(f"{__name__}.{part}")
                __all__.append(part)
    if is_installed("mmengine"):
        from .checkpoint import allow_mmengine_checkpoints, check_what_mmengine_loads

        allow_mmengine_checkpoints()
        check_what_mmengine_loads()


def __getattr__(name: str):
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")  # raises an error that says what to install
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register_parts()
