"""Equivalent-norm-constrained (ENC) training for mmengine, mmpretrain and timm.

Importing the package registers every part on mmengine's root registries; in a config:
``custom_imports = dict(imports=['enc_plugin'])``.
"""

import os
import warnings

from ._environment import check_environment

check_environment()

with warnings.catch_warnings():
    # mmcv-lite's warning about an operator that classification never calls.
    if os.environ.get("ENC_VERBOSE", "0") in ("", "0"):
        warnings.filterwarnings("ignore", "Fail to import ``MultiScaleDeformableAttention``", UserWarning)
    from . import checkpoint, datasets, engine, models
from ._paths import config_path  # noqa: E402
from .convert import Audit, ConversionReport, NoEffectWarning, audit, fold, to_enc  # noqa: E402
from .layers import CheckpointWarning, ENCConv1d, ENCConv2d, ENCConv3d, ENCLinear  # noqa: E402
from .optim import add_shift, param_groups_enc  # noqa: E402
from .version import __version__  # noqa: E402

checkpoint.allow_mmengine_checkpoints()

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
    "add_shift",
    "audit",
    "config_path",
    "datasets",
    "engine",
    "fold",
    "models",
    "param_groups_enc",
    "to_enc",
]
