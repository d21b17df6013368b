"""Mixed precision without CUDA."""

from __future__ import annotations

from contextlib import contextmanager
from logging import Logger

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import nn

from ..build import part_class


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Optimizer wrapper whose forward passes run under bfloat16 autocast, on any device and without loss scaling.

    mmengine's ``AmpOptimWrapper`` insists on an accelerator.

    Args:
        *args, **kwargs: As for mmengine's ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Forward context: gradient accumulation as in ``OptimWrapper``, plus autocast."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def without_cuda(optim_wrapper, logger: Logger):
    """``AmpOptimWrapper`` in a config becomes :class:`BFloat16OptimWrapper` where there is no CUDA; else unchanged."""
    if torch.cuda.is_available() or not isinstance(optim_wrapper, dict):
        return optim_wrapper
    if part_class(optim_wrapper, OPTIM_WRAPPERS) is not AmpOptimWrapper:
        return optim_wrapper
    logger.info("ENC: no CUDA, mixed precision is bfloat16 autocast without loss scaling")
    own = {k: v for k, v in optim_wrapper.items() if k not in ("loss_scale", "dtype", "use_fsdp")}
    return own | {"type": "BFloat16OptimWrapper"}
