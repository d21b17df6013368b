"""mmengine parts, registered on mmengine's root registries."""

from .amp import BFloat16OptimWrapper
from .audit_hook import ENCAuditHook
from .fgsm_hook import FGSMHook
from .gbr_hook import GBRHook
from .optim import ENCOptimWrapperConstructor
from .progress_hook import ProgressHook
from .runner import ENCRunner
from .visualizers import ENCWandbVisBackend

__all__ = [
    "BFloat16OptimWrapper",
    "ENCAuditHook",
    "ENCOptimWrapperConstructor",
    "ENCRunner",
    "ENCWandbVisBackend",
    "FGSMHook",
    "GBRHook",
    "ProgressHook",
]
