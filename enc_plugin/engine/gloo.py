"""Distributed training without CUDA, by gloo."""

from __future__ import annotations

import atexit
import time
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.registry import MODEL_WRAPPERS
from torch.nn.parallel import DistributedDataParallel

from ..build import part_class


def join_gloo(launcher: str) -> None:
    """Initialise the process group with gloo; mmengine would first select a CUDA device.

    Args:
        launcher: Launcher of the run.

    Raises:
        ValueError: If ``launcher`` is not ``'pytorch'``.
    """
    if launcher != "pytorch":
        raise ValueError(
            f"launcher: without CUDA only 'pytorch' works, got {launcher!r}; "
            "start the processes with torchrun (tools/dist_train.sh)"
        )
    torch.distributed.init_process_group("gloo")
    atexit.register(_leave)
    if torch.distributed.get_rank() == 0:
        print_log("ENC: without CUDA, the distributed backend is gloo", logger=None)


def ddp_on_cpu(model_wrapper_cfg: Mapping[str, Any] | None, find_unused_parameters: bool) -> dict[str, Any]:
    """``model_wrapper_cfg`` without device ids, which mmengine would pass to DDP.

    Args:
        model_wrapper_cfg: That of the config; None: mmengine's default.
        find_unused_parameters: Option of the config for the default.
    """
    default = {"broadcast_buffers": False, "find_unused_parameters": find_unused_parameters}
    settings = {"type": "MMDistributedDataParallel", **(default if model_wrapper_cfg is None else model_wrapper_cfg)}
    is_ddp = issubclass(part_class(settings, MODEL_WRAPPERS) or object, DistributedDataParallel)
    return settings | {"device_ids": None} if is_ddp else settings


def _leave() -> None:
    """Destroy the process group before exit, because gloo's threads sometimes abort the exiting interpreter."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.2)
