"""Runner, hooks and other mmengine parts, registered on mmengine's root registries."""

from ..installation import needs_mmengine  # noqa: F401

# isort: split
from .amp import BFloat16OptimWrapper
from .audit_hook import ENCAuditHook
from .bn_eps_hook import BatchNormEpsHook
from .checkpoint_hook import ENCCheckpointHook
from .constructor import ENCOptimWrapperConstructor
from .fgsm_hook import FGSMHook
from .gbr_hook import GBRHook
from .guard_hook import ENCGuardHook
from .monitor_hook import ENCMonitorHook
from .progress_hook import ProgressHook
from .projection_hook import ENCProjectionHook
from .rng_hook import RNGStateHook
from .runner import ENCRunner
from .visualizers import ENCWandbVisBackend

__all__ = [
    "BFloat16OptimWrapper",
    "BatchNormEpsHook",
    "ENCAuditHook",
    "ENCCheckpointHook",
    "ENCGuardHook",
    "ENCMonitorHook",
    "ENCOptimWrapperConstructor",
    "ENCProjectionHook",
    "ENCRunner",
    "ENCWandbVisBackend",
    "FGSMHook",
    "GBRHook",
    "ProgressHook",
    "RNGStateHook",
]

# All scalars that these hooks log; reports use this to read logs.
SCALARS = tuple(scalar for name in __all__ for scalar in getattr(globals()[name], "scalars", ()))
