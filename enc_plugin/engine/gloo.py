"""Distributed training without CUDA, by gloo."""

from __future__ import annotations

import atexit
import time
from typing import Any

import torch
from mmengine.logging import print_log


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


def ddp_on_cpu(find_unused_parameters: bool) -> dict[str, Any]:
    """``model_wrapper_cfg`` of DDP without device ids; mmengine would always pass them."""
    return {
        "type": "MMDistributedDataParallel",
        "device_ids": None,
        "broadcast_buffers": False,
        "find_unused_parameters": find_unused_parameters,
    }


def _leave() -> None:
    """Destroy the process group before exit, because gloo's threads sometimes abort the exiting interpreter."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.2)
