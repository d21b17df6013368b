"""Runner that works without CUDA, alone and distributed, and states the ENC constraint at the start and the end."""

from __future__ import annotations

import atexit
import time

import torch
from mmengine.dist import is_distributed
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from .amp import without_cuda
from .audit_hook import unwrap
from .guard import NO_SAMPLES, check_loop, check_work_dir


@RUNNERS.register_module()
class ENCRunner(Runner):
    """mmengine's Runner with what ENC training needs; ``runner_type = 'ENCRunner'`` in a config.

    - Without CUDA, distributed runs use gloo, DDP wraps without device ids, and ``AmpOptimWrapper`` becomes bfloat16
      autocast, each with a log line; stock mmengine stops with an error at all three.
    - :class:`ENCAuditHook` and :class:`ENCGuardHook` join the default hooks (``default_hooks=dict(enc_audit=None,
      enc_guard=None)`` turns them off).
    - A work dir that cannot be written to, and intervals of 0, are refused before anything is built.

    Args:
        model, work_dir, *args, **kwargs: As for mmengine's Runner.

    Raises:
        ValueError: If the work dir cannot be written to, or a number of epochs or an interval is below 1.
    """

    def __init__(self, model: nn.Module | dict, work_dir: str, *args, **kwargs):
        check_work_dir(work_dir)
        check_loop(kwargs.get("train_cfg"))
        super().__init__(model, work_dir, *args, **kwargs)

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

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        """Build as mmengine does; a dataset without samples is an error that says so."""
        try:
            return Runner.build_dataloader(dataloader, *args, **kwargs)
        except ValueError as error:
            if "need at least one array to concatenate" not in str(error):
                raise
            raise ValueError(f"dataloader: {NO_SAMPLES}") from error  # mmengine stumbles when it serialises them

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        """Load as mmengine does, which only logs what does not fit: a checkpoint of another network is an error.

        To train from, half of the tensors that have a place in the model have to fit it (a classifier of other classes
        may be left out); to validate or test, every tensor of the model has to be there.

        Raises:
            ValueError: If too little of the checkpoint fits the model, or it holds NaN or Inf.
        """
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        # mmengine looks through the prefix of a distributed wrapper.
        saved = {key.removeprefix("module."): value for key, value in checkpoint.get("state_dict", checkpoint).items()}
        wanted = unwrap(self.model).state_dict()
        common = saved.keys() & wanted.keys()
        if not common:
            raise ValueError(
                f"load_from: nothing of {filename} fits the model; its keys are {', '.join(map(repr, [*saved][:3]))}, "
                f"..., the model's are {', '.join(map(repr, [*wanted][:3]))}, ...; is it a checkpoint of another "
                "codebase?"
            )
        fitting = {key for key in common if saved[key].shape == wanted[key].shape}
        if 2 * len(fitting) < len(common):
            key = next(key for key in wanted if key in common - fitting)
            raise ValueError(
                f"load_from: only {len(fitting)} of the {len(common)} tensors that {filename} shares with the model "
                f"have its shapes ({key!r}: {tuple(saved[key].shape)} there, {tuple(wanted[key].shape)} in the model); "
                "is it a checkpoint of another architecture?"
            )
        broken = [key for key in fitting if saved[key].is_floating_point() and not saved[key].isfinite().all()]
        if broken:
            raise ValueError(f"load_from: {filename} holds NaN or Inf in {len(broken)} tensors: {min(broken)!r}, ...")
        untrained = [key for key in wanted if key not in fitting and not key.endswith("num_batches_tracked")]
        if untrained and filename == self._load_from and not isinstance(self._train_loop, BaseLoop):
            raise ValueError(
                f"load_from: {filename} lacks {len(untrained)} tensors of the model ({untrained[0]!r}, ...), which "
                "would be measured untrained; use the config that it was trained with (a copy is in its work_dir)"
            )
        return checkpoint

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register mmengine's default hooks, the ENC audit and the guard."""
        own = {"enc_guard": {"type": "ENCGuardHook"}, "enc_audit": {"type": "ENCAuditHook"}}
        hooks = own | dict(hooks or {})
        # mmengine takes None for its own hooks alone.
        super().register_default_hooks({k: v for k, v in hooks.items() if v is not None or k not in own})


def _leave_process_group() -> None:
    """Leave gloo in order: its threads sometimes abort the interpreter while it exits, after all is saved."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.2)
