"""Mixed precision without CUDA."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from logging import Logger
from pathlib import Path

import torch
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import nn

from ..build import part_class


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Optimizer wrapper whose forward passes run under bfloat16 autocast, on any device and without loss scaling.

    mmengine's ``AmpOptimWrapper`` needs an accelerator. On a CPU without bfloat16 instructions this wrapper warns,
    because training is then 7 to 30 times slower than in float32.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not torch.cuda.is_available() and not has_bfloat16_instructions():
            print_log(
                "ENC: this CPU has no bfloat16 instructions, so bfloat16 is emulated, 7 to 30 times slower than "
                "float32; leave out AmpOptimWrapper (or --amp)",
                logger="current",
                level=logging.WARNING,
            )

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Context of forward passes: that of ``OptimWrapper`` (gradient accumulation) and autocast."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def has_bfloat16_instructions() -> bool:
    """Whether the CPU has bfloat16 instructions, according to /proc/cpuinfo; True if that gives no answer."""
    try:
        features = re.findall(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return True
    return not features or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(features[0].split()))


def without_cuda(optim_wrapper, logger: Logger):
    """Replace ``AmpOptimWrapper`` in a config by :class:`BFloat16OptimWrapper` if there is no CUDA."""
    if torch.cuda.is_available() or part_class(optim_wrapper, OPTIM_WRAPPERS) is not AmpOptimWrapper:
        return optim_wrapper
    logger.info("ENC: without CUDA, mixed precision uses bfloat16 autocast without loss scaling")
    own = {k: v for k, v in optim_wrapper.items() if k not in ("loss_scale", "dtype", "use_fsdp")}
    return own | {"type": "BFloat16OptimWrapper"}
