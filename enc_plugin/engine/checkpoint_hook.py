"""CheckpointHook with which a run can be killed at any time without losing its last checkpoint."""

from __future__ import annotations

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoint_files import replacing


@HOOKS.register_module()
class ENCCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook in a safe order: write the new file, update ``last_checkpoint``, remove old files.

    mmengine's hook removes old files first (``max_keep_ckpts``, ``save_best``) and overwrites ``last_checkpoint`` in
    place, so a crash can leave nothing to resume from. ``ENCRunner`` replaces ``CheckpointHook`` by this hook. While a
    checkpoint is written, there is one file more than ``max_keep_ckpts``.
    """

    def before_train(self, runner: Runner) -> None:
        """Set up as mmengine does, and correct the paths of best checkpoints if the work dir was moved or copied."""
        super().before_train(runner)
        hub = runner.message_hub
        for key, path in list(hub.runtime_info.items()):
            if key.startswith("best_ckpt") and path:
                # The old path may be in the work dir of another run, whose file must not be removed.
                path = self.file_backend.join_path(self.out_dir, Path(path).name)
                hub.update_info(key, path)
                if key == "best_ckpt":
                    self.best_ckpt_path = path
                else:
                    self.best_ckpt_path_dict[key.removeprefix("best_ckpt_")] = path

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = []
        # If the same step is saved twice (after a new best), no old file becomes outdated.
        if self.max_keep_ckpts > 0 and list(self.keep_ckpt_ids)[-1:] != [step]:
            outdated = list(self.keep_ckpt_ids)[: max(0, len(self.keep_ckpt_ids) + 1 - self.max_keep_ckpts)]
            self.keep_ckpt_ids.append(step)  # the deque drops outdated ids
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            filename,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            with replacing(Path(runner.work_dir, "last_checkpoint")) as partial:
                partial.write_text(self.last_ckpt)
            for old in outdated:
                _remove_checkpoint(
                    self.file_backend, self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
                )

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Save a new best checkpoint as mmengine does, but only in training, not in ``runner.val()``."""
        if hasattr(self, "file_backend"):  # set by before_train
            super().after_val_epoch(runner, metrics)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        missing = [key for key in self.save_best or [] if key not in metrics and key != "auto"]
        if missing:
            raise ValueError(
                f"save_best: expected metrics of the validation, got {missing[0]!r}; they are "
                f"{', '.join(map(repr, metrics))}"
            )
        backend = self.file_backend
        self.file_backend = later = _RemovesLater(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        info = runner.message_hub.runtime_info
        current = {value for key, value in info.items() if key.startswith("best_ckpt")}
        for path in later.outdated - current:
            _remove_checkpoint(backend, path)


class _RemovesLater:
    """File backend that collects the paths to remove instead of removing them."""

    def __init__(self, backend):
        self._backend = backend
        self.outdated: set[str] = set()

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.outdated.add(path)

    rmtree = remove


def _remove_checkpoint(backend, path: str) -> None:
    """Remove a checkpoint (a file, or a folder if sharded) if it exists."""
    if backend.isfile(path):
        backend.remove(path)
    elif backend.isdir(path):
        backend.rmtree(path)
