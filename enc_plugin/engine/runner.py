"""Runner that works without CUDA, alone and distributed, and states the ENC constraint at the start and the end."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast_object_list, is_distributed, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from ..build import make_dataset, part_class
from ..checkpoint import find_damage, latest_checkpoint, replacing
from ..measuring.ranks import on_all_ranks
from ..measuring.untouched import unwrap
from ..packed import is_packing_chosen, pack_weights
from ..refused import Refused, describe, require_file
from ..surgery.loading import Loading
from ..surgery.projected import constrained_layers
from ..surgery.startup_average import average_from_start
from .amp import without_cuda
from .checkpoint_hook import ENCCheckpointHook
from .gloo import ddp_on_cpu, join_gloo
from .guard_hook import ENCGuardHook
from .limits import check_distributed, refuse_strategy
from .loadable import make_loadable
from .loaded import check_loaded
from .preflight import check_loop, check_work_dir, why_step_fails
from .rng_hook import RNGStateHook
from .worker_seeds import seed_workers_by_epoch

_LOADER = "<dataloader>"  # stands for the key that the one who builds the loop knows


@RUNNERS.register_module()
class ENCRunner(Runner):
    """mmengine's Runner with what ENC training needs; ``runner_type = 'ENCRunner'`` in a config.

    - Without CUDA, distributed runs use gloo, DDP wraps without device ids, and ``AmpOptimWrapper`` becomes bfloat16
      autocast, each with a log line; stock mmengine stops with an error at all three.
    - :class:`ENCAuditHook`, :class:`ENCGuardHook`, :class:`RNGStateHook` and, on a terminal, :class:`ProgressHook` join
      the default hooks, as ``enc_audit``, ``enc_guard``, ``rng_state`` and ``progress``
      (``default_hooks=dict(enc_audit=None)`` turns one off); ``CheckpointHook`` becomes :class:`ENCCheckpointHook`.
    - A work dir that cannot be written to, and intervals of 0, are refused before anything is built.
    - A checkpoint is written whole or not at all. Resuming goes by checksums: ``resume=True`` falls back on the newest
      checkpoint that is whole, with a warning; a damaged one that is named explicitly is an error.
    - Data loading workers are seeded by epoch, where mmengine's would repeat the same augmentations.

    Args:
        model, work_dir, *args, **kwargs: As for mmengine's Runner.

    Raises:
        ValueError: If the work dir cannot be written to, or a number of epochs or an interval is below 1.
        FileNotFoundError: If there is no file ``load_from``.
    """

    def __init__(self, model: nn.Module | dict, work_dir: str, *args, **kwargs):
        check_work_dir(work_dir)
        check_loop(kwargs.get("train_cfg"))
        if kwargs.get("load_from") is not None:
            require_file("load_from", kwargs["load_from"])
        if (kwargs.get("randomness") or {}).get("deterministic"):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products on a GPU raise without it
        super().__init__(model, work_dir, *args, **kwargs)

    def setup_env(self, env_cfg: dict) -> None:
        """Set the environment up as mmengine does, with gloo as the backend where there is no CUDA."""
        if self.distributed and not is_distributed() and not torch.cuda.is_available():
            join_gloo(self._launcher)  # mmengine leaves an existing process group alone
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap for distributed training as mmengine does, without device ids where there is no CUDA.

        Raises:
            ValueError: For synchronised batch norm on the CPU, sharded parameters (FSDP), and a ``strategy``.
        """
        refuse_strategy(self.cfg.get("strategy"))
        if self.distributed:
            check_distributed(self.cfg.get("sync_bn"), model_wrapper_cfg, model)
        if self.distributed and model_wrapper_cfg is None and not torch.cuda.is_available():
            model_wrapper_cfg = ddp_on_cpu(self.cfg.get("find_unused_parameters", False))
        wrapped = super().wrap_model(model_wrapper_cfg, model)
        if next(constrained_layers(wrapped), None) is not None:
            # Again: a backbone may be ENC by conv_cfg alone, or have got other norms.
            average_from_start(unwrap(wrapped))
            if not is_packing_chosen(wrapped):
                pack_weights(unwrap(wrapped))
        return wrapped

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build as mmengine does, on all ranks or on none."""
        return self._build_loop("train_dataloader", super().build_train_loop, loop)

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build as mmengine does, on all ranks or on none."""
        return self._build_loop("val_dataloader", super().build_val_loop, loop)

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build as mmengine does, on all ranks or on none."""
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
        """Build the optimizer wrapper, mixed precision included, on any device."""
        return super().build_optim_wrapper(without_cuda(optim_wrapper, self.logger))

    def train(self) -> nn.Module:
        """Train as mmengine does; a resumed run starts from the last checkpoint that is whole, with its seed.

        Raises:
            ValueError: If the run is to be resumed and has checkpoints, all of them damaged.
        """
        if self._resume and not self._has_loaded:
            if self._load_from is None:
                self._load_from = self._latest_checkpoint()
            if self._load_from is not None:
                self._take_seed(self._load_from)
        try:
            return super().train()
        except (RuntimeError, TypeError, IndexError, AttributeError, AssertionError) as error:
            batch = self._first_batch(error)
            if batch is None:
                raise
            model = unwrap(self.model)
            raise Refused(
                f"model: the first training step fails ({describe(error)})",
                why_step_fails(model, model.data_preprocessor(batch)["inputs"]),
            ) from error

    def _first_batch(self, error: Exception) -> Any:
        """The batch on which training fails at its first step; None later on, and where the memory is too small."""
        guard = next((hook for hook in self.hooks if isinstance(hook, ENCGuardHook)), None)
        if guard is None or self.iter > guard.first_iter or isinstance(error, torch.OutOfMemoryError):
            return None
        return guard.batch

    def _latest_checkpoint(self) -> str | None:
        """The checkpoint to go on from, None if there is none; rank 0 decides."""
        found: list = [None, []]
        if is_main_process():
            found = list(latest_checkpoint(self.work_dir, self._checkpoints()))
        broadcast_object_list(found)
        path, problems = found
        if path is None and problems:
            raise ValueError(
                f"resume: no checkpoint in {self.work_dir} is whole ({'; '.join(problems)}); leave --resume out to "
                "train from the beginning"
            )
        for problem in problems:
            self.logger.warning(f"ENC: cannot resume from {problem}")
        if problems:
            self.logger.warning(f"ENC: the newest checkpoint that is whole is {path}; the run goes on from there")
        return path

    def _checkpoints(self) -> Iterator[Path]:
        """Files that CheckpointHook wrote to go on from (best_*.pth hold no optimizer)."""
        for hook in self.hooks:
            if isinstance(hook, CheckpointHook):
                folder = Path(hook.out_dir, Path(self.work_dir).name) if hook.out_dir else Path(self.work_dir)
                yield from folder.glob(hook.filename_tmpl.format("*"))

    def _take_seed(self, filename: str) -> None:
        """Draw with the seed of the checkpoint from the start: mmengine takes it once the sampler has another one."""
        if find_damage(filename) is not None:  # a remote file, or one that loading will refuse
            return
        meta = torch.load(filename, map_location="cpu", mmap=zipfile.is_zipfile(filename)).get("meta") or {}
        seed, configured = meta.get("seed"), self._randomness_cfg.get("seed")
        if seed is None or seed == configured:
            return
        if configured is not None:
            self.logger.warning(
                f"ENC: the resumed run has seed {seed}, the config {configured}; it goes on with {seed}"
            )
        self._randomness_cfg.update(seed=seed)
        self.set_randomness(**self._randomness_cfg)

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build as mmengine does, with workers that draw other random numbers in each epoch.

        Raises:
            ValueError: If the dataset cannot be built or has no samples.
        """
        try:
            built = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        except Exception:
            if isinstance(dataloader, dict) and isinstance(dataloader.get("dataset"), dict):
                make_dataset(_LOADER, dataloader["dataset"])  # raises the clear error, if it is the dataset's
            raise
        if isinstance(dataloader, dict) and built.num_workers and seed is not None:
            seed_workers_by_epoch(built, seed)
        return built

    def save_checkpoint(self, out_dir: str, filename: str, file_client_args: dict | None = None, **kwargs) -> None:
        """Save as mmengine does, but whole or not at all, and with the random states of all ranks.

        Args:
            out_dir, filename, file_client_args, **kwargs: As for mmengine's Runner. Every rank has to call it.

        Raises:
            OSError: If the file cannot be written, for a full disk, say; an older one of this name is as it was.
        """
        for hook in self.hooks:
            if isinstance(hook, RNGStateHook):
                hook.gather(self)
        if not is_main_process():
            return
        kwargs["file_client_args"] = file_client_args
        if file_client_args or not isinstance(
            get_file_backend(out_dir, backend_args=kwargs.get("backend_args")), LocalBackend
        ):
            super().save_checkpoint(out_dir, filename, **kwargs)  # object stores replace whole files by themselves
            return
        path = Path(out_dir, filename)
        try:
            with replacing(path) as partial:
                super().save_checkpoint(out_dir, partial.name, **kwargs)
        except OSError as error:
            raise OSError(
                error.errno,
                f"checkpoint: {path} could not be written ({error.strerror}). Earlier checkpoints are as they were: "
                "make room (max_keep_ckpts of CheckpointHook keeps fewer), then go on from the last one with --resume",
            ) from error

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call as mmengine does; what is about to be saved is made loadable once all hooks have added to it.

        Raises:
            ValueError: If a checkpoint would hold what loading refuses: at the save, or before training if the dataset
                has it.
        """
        if fn_name == "before_train":
            make_loadable(getattr(self.train_dataloader.dataset, "metainfo", None), "the dataset's metainfo")
        super().call_hook(fn_name, **kwargs)
        if fn_name == "before_save_checkpoint":
            checkpoint = kwargs["checkpoint"]
            checkpoint.update({key: make_loadable(value, key) for key, value in checkpoint.items()})

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        """Load as mmengine does, which only logs what does not fit: here a checkpoint of another network is an error.

        Raises:
            ValueError: If the file is damaged, too little of it fits the model
                (:func:`~enc_plugin.engine.loaded.check_loaded`), or it holds NaN or Inf.
        """
        damage = find_damage(filename) if Path(filename).is_file() else None  # else a URL: mmengine's business
        if damage is not None:
            raise ValueError(
                f"load_from: {filename} is damaged ({damage}); name another checkpoint, or leave it out with --resume "
                "to go on from the newest one that is whole"
            )
        loading = Loading(self.model)
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        to_measure = filename == self._load_from and not isinstance(self._train_loop, BaseLoop)
        check_loaded(filename, checkpoint.get("state_dict", checkpoint), loading, to_measure)
        return checkpoint

    def register_hook(self, hook: Hook | dict, priority: str | int | None = None) -> None:
        """Register as mmengine does, with ENCCheckpointHook for CheckpointHook."""
        if isinstance(hook, dict) and part_class(hook, HOOKS) is CheckpointHook:
            hook = dict(hook, type=ENCCheckpointHook)
        elif type(hook) is CheckpointHook:
            hook.__class__ = ENCCheckpointHook
        super().register_hook(hook, priority)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register mmengine's default hooks and ours."""
        own = {
            "enc_guard": {"type": "ENCGuardHook"},
            "enc_audit": {"type": "ENCAuditHook"},
            "enc_projection": {"type": "ENCProjectionHook"},
            "rng_state": {"type": "RNGStateHook"},
            "progress": {"type": "ProgressHook"},
        }
        # None switches off; mmengine knows that of its own hooks only.
        hooks = {name: hook for name, hook in (own | (hooks or {})).items() if name not in own or hook is not None}
        super().register_default_hooks(hooks)
