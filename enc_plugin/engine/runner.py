"""Runner for ENC training, with and without CUDA, in one process or several."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_distributed, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from ..build import make_dataset, part_class
from ..checkpoint_files import find_damage, replacing
from ..measuring.ranks import on_all_ranks
from ..measuring.untouched import unwrap
from ..packed import is_packing_chosen, pack_weights
from ..refused import Refused, describe, require_file
from ..steps.running_step import is_zero
from ..surgery.loading import Loading
from ..surgery.projected import constrained_layers
from ..surgery.startup_average import average_from_start
from .amp import without_cuda
from .checkpoint_hook import ENCCheckpointHook
from .gloo import ddp_on_cpu, join_gloo
from .guard_hook import ENCGuardHook
from .limits import check_distributed, refuse_merged_norms, refuse_strategy
from .loadable import make_loadable, without_functions
from .loaded import check_loaded
from .preflight import check_loop, check_schedules, check_work_dir, why_step_fails
from .resume import find_checkpoint, take_seed
from .rng_hook import RNGStateHook
from .worker_seeds import seed_workers_by_epoch
from .wrappers import optim_wrappers

_LOADER = "<dataloader>"  # placeholder in errors; _build_loop replaces it by the config key of the dataloader


@RUNNERS.register_module()
class ENCRunner(Runner):
    """mmengine's Runner with additions for ENC training; in a config: ``runner_type = 'ENCRunner'``.

    - It works without CUDA, where stock mmengine raises an error: distributed runs use gloo, DDP has no device ids, and
      ``AmpOptimWrapper`` is replaced by bfloat16 autocast.
    - It adds default hooks: ``enc_guard`` (:class:`ENCGuardHook`), ``enc_audit`` (:class:`ENCAuditHook`),
      ``enc_projection`` (:class:`ENCProjectionHook`), ``rng_state`` (:class:`RNGStateHook`) and ``progress``
      (:class:`ProgressHook`). ``default_hooks=dict(enc_audit=None)`` turns one off. It replaces ``CheckpointHook`` by
      :class:`ENCCheckpointHook`.
    - It checks the work dir and the numbers of epochs and intervals before it builds anything.
    - It writes each checkpoint whole or not at all, and verifies checksums before it loads one: ``resume=True`` uses
      the newest undamaged checkpoint, with a warning if it is not the last; a damaged ``load_from`` is an error.
    - It seeds data loading workers by epoch; mmengine's would repeat the same augmentations in each epoch.

    Args:
        model, work_dir, *args, **kwargs: As for mmengine's Runner.

    Raises:
        ValueError: If the work dir cannot be written to, or a number of epochs or an interval is below 1.
        FileNotFoundError: If the file ``load_from`` does not exist.
    """

    def __init__(self, model: nn.Module | dict, work_dir: str, *args, **kwargs):
        check_work_dir(work_dir)
        check_loop(kwargs.get("train_cfg"))
        if kwargs.get("load_from") is not None:
            require_file("load_from", kwargs["load_from"])
        if (kwargs.get("randomness") or {}).get("deterministic"):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else deterministic matrix products raise
        super().__init__(model, work_dir, *args, **kwargs)

    def setup_env(self, env_cfg: dict) -> None:
        """Set up the environment as mmengine does, with gloo if there is no CUDA."""
        if self.distributed and not is_distributed() and not torch.cuda.is_available():
            join_gloo(self._launcher)  # mmengine uses an existing process group
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap for distributed training as mmengine does, without device ids if there is no CUDA.

        Raises:
            ValueError: If the config has synchronised batch norm on the CPU, sharded parameters (FSDP), a
                ``strategy``, or ``efficient_conv_bn_eval`` for ENC layers.
        """
        refuse_strategy(self.cfg.get("strategy"))
        refuse_merged_norms(self.cfg.get("efficient_conv_bn_eval"), model)
        if self.distributed:
            check_distributed(self.cfg.get("sync_bn"), model_wrapper_cfg, model)
        if self.distributed and not torch.cuda.is_available():
            model_wrapper_cfg = ddp_on_cpu(model_wrapper_cfg, self.cfg.get("find_unused_parameters", False))
        wrapped = super().wrap_model(model_wrapper_cfg, model)
        if next(constrained_layers(wrapped), None) is not None:
            # to_enc does the same, but a backbone that is ENC by conv_cfg never calls it, and norms may have changed.
            average_from_start(unwrap(wrapped))
            if not is_packing_chosen(wrapped):
                pack_weights(unwrap(wrapped))
        return wrapped

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build as mmengine does; an error is raised on all ranks."""
        return self._build_loop("train_dataloader", super().build_train_loop, loop)

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build as mmengine does; an error is raised on all ranks."""
        return self._build_loop("val_dataloader", super().build_val_loop, loop)

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build as mmengine does; an error is raised on all ranks."""
        return self._build_loop("test_dataloader", super().build_test_loop, loop)

    @staticmethod
    def _build_loop(key: str, build: Callable, loop: BaseLoop | dict) -> BaseLoop:
        def named() -> BaseLoop:
            try:
                return build(loop)
            except Refused as error:
                found, advice = (text.replace(_LOADER, key) for text in (error.found, error.advice))
                raise Refused(found, advice) from error

        return on_all_ranks(named)

    def build_optim_wrapper(self, optim_wrapper):
        """Build the optimizer wrapper as mmengine does; mixed precision works without CUDA too."""
        return super().build_optim_wrapper(without_cuda(optim_wrapper, self.logger))

    def build_param_scheduler(self, scheduler):
        """Build the schedules as mmengine does; one that begins when training ends is an error that names it."""
        check_schedules(scheduler, {"epochs": self.max_epochs, "iters": self.max_iters})
        return super().build_param_scheduler(scheduler)

    def train(self) -> nn.Module:
        """Train as mmengine does; a resumed run starts from the newest undamaged checkpoint, with its seed.

        Raises:
            ValueError: If the run is resumed and all its checkpoints are damaged, or the first training step fails.
        """
        if self._resume and not self._has_loaded:
            if self._load_from is None:
                self._load_from = find_checkpoint(self)
            if self._load_from is not None:
                take_seed(self, self._load_from)
        try:
            return super().train()
        except (RuntimeError, TypeError, IndexError, AttributeError, AssertionError) as error:
            batch = self._first_batch(error)
            if batch is None:
                raise
            raise Refused(
                f"model: the first training step fails ({describe(error)})", why_step_fails(unwrap(self.model), batch)
            ) from error

    def _first_batch(self, error: Exception) -> Any:
        """The batch of the first training step if ``error`` was raised in it and is not an OutOfMemoryError."""
        guard = next((hook for hook in self.hooks if isinstance(hook, ENCGuardHook)), None)
        if guard is None or self.iter > guard.first_iter or isinstance(error, torch.OutOfMemoryError):
            return None
        return guard.batch

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build as mmengine does, with workers that are seeded by epoch.

        Raises:
            ValueError: If the dataset cannot be built or has no samples.
        """
        try:
            built = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        except Exception:
            if isinstance(dataloader, dict) and isinstance(dataloader.get("dataset"), dict):
                make_dataset(_LOADER, dataloader["dataset"])  # raises a clearer error if the dataset is the cause
            raise
        if isinstance(dataloader, dict) and built.num_workers and seed is not None:
            seed_workers_by_epoch(built, seed)
        return built

    def save_checkpoint(self, out_dir: str, filename: str, file_client_args: dict | None = None, **kwargs) -> None:
        """Save as mmengine does, but whole or not at all, and with the random states of all ranks.

        Every rank has to call this.

        Args:
            out_dir, filename, file_client_args, **kwargs: As for mmengine's Runner.

        Raises:
            OSError: If the file cannot be written; an older file of this name is unchanged.
        """
        for hook in self.hooks:
            if isinstance(hook, RNGStateHook):
                hook.gather(self)
        if not is_main_process():
            if kwargs.get("save_optimizer", True):
                for wrapper in optim_wrappers(self):
                    if is_zero(wrapper.optimizer):  # rank 0 waits for the shares of the others
                        wrapper.state_dict()
            return
        kwargs["file_client_args"] = file_client_args
        if file_client_args or not isinstance(
            get_file_backend(out_dir, backend_args=kwargs.get("backend_args")), LocalBackend
        ):
            super().save_checkpoint(out_dir, filename, **kwargs)  # object stores replace files as a whole anyway
            return
        path = Path(out_dir, filename)
        try:
            with replacing(path) as partial:
                super().save_checkpoint(out_dir, partial.name, **kwargs)
        except OSError as error:
            raise OSError(
                error.errno,
                f"checkpoint: {path} could not be written ({error.strerror}). Earlier checkpoints are unchanged: free "
                "disk space (max_keep_ckpts of CheckpointHook keeps fewer), then continue with --resume",
            ) from error

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call as mmengine does; before a checkpoint is saved, convert its content to types that can be loaded.

        Raises:
            ValueError: If the checkpoint, or before training the dataset's metainfo, contains a type that loading would
                refuse.
        """
        if fn_name == "before_train":
            make_loadable(getattr(self.train_dataloader.dataset, "metainfo", None), "the dataset's metainfo")
        super().call_hook(fn_name, **kwargs)
        if fn_name == "before_save_checkpoint":
            checkpoint = kwargs["checkpoint"]
            if "param_schedulers" in checkpoint:
                checkpoint["param_schedulers"] = without_functions(checkpoint["param_schedulers"])
            checkpoint.update({key: make_loadable(value, key) for key, value in checkpoint.items()})

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        """Load as mmengine does, but raise if the checkpoint does not fit the model, which mmengine only logs.

        Raises:
            ValueError: If the file is damaged, holds NaN or Inf, or too little of it fits the model
                (:func:`~enc_plugin.engine.loaded.check_loaded`).
        """
        damage = find_damage(filename) if Path(filename).is_file() else None  # URLs are not checked
        if damage is not None:
            raise ValueError(
                f"load_from: {filename} is damaged ({damage}); choose another checkpoint, or use --resume without "
                "load_from to continue from the newest undamaged one"
            )
        loading = Loading(self.model)
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        to_measure = filename == self._load_from and not isinstance(self._train_loop, BaseLoop)
        check_loaded(filename, checkpoint.get("state_dict", checkpoint), loading, to_measure)
        return checkpoint

    def register_hook(self, hook: Hook | dict, priority: str | int | None = None) -> None:
        """Register as mmengine does, with ENCCheckpointHook instead of CheckpointHook."""
        if isinstance(hook, dict) and part_class(hook, HOOKS) is CheckpointHook:
            hook = dict(hook, type=ENCCheckpointHook)
        elif type(hook) is CheckpointHook:
            hook.__class__ = ENCCheckpointHook
        super().register_hook(hook, priority)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register mmengine's default hooks and those of this class."""
        own = {
            "enc_guard": {"type": "ENCGuardHook"},
            "enc_audit": {"type": "ENCAuditHook"},
            "enc_projection": {"type": "ENCProjectionHook"},
            "rng_state": {"type": "RNGStateHook"},
            "progress": {"type": "ProgressHook"},
        }
        # None turns a hook off; mmengine supports that only for its own hooks.
        hooks = {name: hook for name, hook in (own | (hooks or {})).items() if name not in own or hook is not None}
        super().register_default_hooks(hooks)
