"""Runner that works without CUDA, alone and distributed, and states the ENC constraint at the start and the end."""

from __future__ import annotations

import atexit
import time

import torch
from mmengine.dist import is_distributed
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from .amp import without_cuda
from .audit_hook import unwrap


@RUNNERS.register_module()
class ENCRunner(Runner):
    """mmengine's Runner with what ENC training needs; ``runner_type = 'ENCRunner'`` in a config.

    - Without CUDA, distributed runs use gloo, DDP wraps without device ids, and ``AmpOptimWrapper`` becomes bfloat16
      autocast, each with a log line; stock mmengine stops with an error at all three.
    - :class:`ENCAuditHook` and, on a terminal, :class:`ProgressHook` join the default hooks
      (``default_hooks=dict(enc_audit=None, progress=None)`` turns them off).

    Args:
        *args, **kwargs: As for mmengine's Runner.
    """

    def setup_env(self, env_cfg: dict) -> None:
        """Set the environment up as mmengine does, with gloo as the backend where there is no CUDA."""
        if self.distributed and not is_distributed() and not torch.cuda.is_available():
            if self._launcher != "pytorch":
                raise ValueError(
                    f"launcher: without CUDA only 'pytorch' works, got {self._launcher!r}; "
                    "start the processes with torchrun (tools/dist_train.sh)"
                )
            # mmengine would select a CUDA device first; it leaves an existing process group alone.
            torch.distributed.init_process_group("gloo")
            atexit.register(_leave_process_group)
            if torch.distributed.get_rank() == 0:
                print_log("ENC: no CUDA, the distributed backend is gloo", logger=None)
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap for distributed training as mmengine does, without device ids where there is no CUDA."""
        if self.distributed and model_wrapper_cfg is None and not torch.cuda.is_available():
            model_wrapper_cfg = {
                "type": "MMDistributedDataParallel",
                "device_ids": None,
                "broadcast_buffers": False,
                "find_unused_parameters": self.cfg.get("find_unused_parameters", False),
            }
        return super().wrap_model(model_wrapper_cfg, model)

    def build_optim_wrapper(self, optim_wrapper):
        """Build the optimizer wrapper, mixed precision included, on any device."""
        return super().build_optim_wrapper(without_cuda(optim_wrapper, self.logger))

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        """Load as mmengine does, which only logs what does not fit; a file of which nothing fits is an error.

        Raises:
            ValueError: If no key of the checkpoint is a key of the model.
        """
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        # mmengine looks through the prefix of a distributed wrapper.
        found = [key.removeprefix("module.") for key in checkpoint.get("state_dict", checkpoint)]
        wanted = list(unwrap(self.model).state_dict())
        if not set(found) & set(wanted):
            raise ValueError(
                f"load_from: nothing of {filename} fits the model; its keys are {', '.join(map(repr, found[:3]))}, "
                f"..., the model's are {', '.join(map(repr, wanted[:3]))}, ...; is it a checkpoint of another codebase?"
            )
        return checkpoint

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register mmengine's default hooks, the ENC audit and the progress display."""
        own = {"enc_audit": {"type": "ENCAuditHook"}, "progress": {"type": "ProgressHook"}}
        hooks = own | (hooks or {})
        # mmengine lets None remove its own hooks only.
        super().register_default_hooks({k: v for k, v in hooks.items() if v is not None or k not in own})


def _leave_process_group() -> None:
    """Leave gloo in order: its threads sometimes abort the interpreter while it exits, after all is saved."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.2)
