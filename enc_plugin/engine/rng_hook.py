"""Hook that makes a resumed run identical to an uninterrupted one."""

from __future__ import annotations

from functools import partial

import torch
from mmengine.dist import gather_object, get_rank, get_world_size
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from ..measuring.untouched import unwrap
from .generators import random_states, restore_random_states, run_generators
from .position import SkippedFirst, is_validation_due, skip


@HOOKS.register_module()
class RNGStateHook(Hook):
    """Saves enough state in each checkpoint that a resumed run is bit-for-bit identical to an uninterrupted one.

    mmengine's checkpoints contain weights, optimizer, schedules and log histories. This hook adds an entry
    ``rng_state``. For each rank it contains the random states of Python, NumPy, torch, all CUDA devices and generators
    in datasets, transforms, samplers and the model, accumulated gradients, and buffers that differ from those of rank 0
    (batch norm statistics). It also contains the number of finished batches of the epoch, and whether the validation
    that was due is finished. A resumed run

    - validates first, if the checkpoint was written before a validation that was due. So a crash loses no metrics, and
      best checkpoints and plateau schedules are those of the uninterrupted run. If the run was stopped after the
      validation, it is repeated with the same values;
    - skips finished batches, if the checkpoint was written within an epoch (``by_epoch=False``): it loads and drops
      them, so that all later random numbers are the same.

    With :class:`ENCRunner`, equal configs, software and hardware, and deterministic operators (on a GPU:
    ``randomness=dict(deterministic=True)``), weights, optimizer state and logged scalars (except times) equal those of
    the uninterrupted run. This holds for any number of processes, and for any number of data loading workers, because
    the runner seeds workers by epoch (:func:`~enc_plugin.engine.worker_seeds.seed_workers_by_epoch`). It does not hold

    - with your own ``worker_init_fn``, and for persistent workers if the sampler has no ``set_epoch``, or in
      validation, where the epoch is not set;
    - for generators of a dataset in persistent workers, because each worker has a copy (with a warning);
    - if the number of processes or the length of an epoch changes (with a warning);
    - for the patience of ``EarlyStoppingHook``, because mmengine does not save it (with a warning).

    Without ENCRunner, only the state of rank 0 is saved.
    """

    priority = "LOWEST"  # before_train after all other hooks have drawn numbers; before_save_checkpoint likewise

    def __init__(self):
        self._ranks: list[dict] | None = None
        self._saved: dict | None = None
        self._batch = 0
        self._validating = False

    def gather(self, runner: Runner) -> None:
        """Collect the states of all ranks for the next checkpoint; every rank has to call this."""
        self._ranks = gather_object(_state(runner))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Record the position in the epoch."""
        self._batch = batch_idx + 1

    def before_val(self, runner: Runner) -> None:
        """Record that checkpoints from now on are saved with the metrics of the validation."""
        self._validating = True

    def after_val(self, runner: Runner) -> None:
        """Record the end of the validation."""
        self._validating = False

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the states to the checkpoint."""
        first, *others = self._ranks or [_state(runner)]
        self._ranks = None
        for state in others:
            state["buffers"] = {
                name: value
                for name, value in state["buffers"].items()
                if not torch.equal(value, first["buffers"][name])
            }
        complete = self._validating or checkpoint["meta"]["epoch"] > runner.epoch
        checkpoint["rng_state"] = {
            "ranks": [first | {"buffers": {}}, *others],
            "world_size": get_world_size(),
            "validated": self._validating,
            "batch": 0 if complete else self._batch,
            "epoch_length": _epoch_length(runner),
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the states until training starts."""
        self._saved = checkpoint.get("rng_state")

    def before_train(self, runner: Runner) -> None:
        """Restore the states, run a missing validation, and skip finished batches."""
        loop, saved, self._saved = runner.train_loop, self._saved, None
        if loop.iter == 0:  # the run is not resumed
            return
        if saved is None:
            runner.logger.warning(
                "RNGStateHook: the checkpoint holds no random states (it was written without this hook); training "
                "continues with other random numbers than an uninterrupted run"
            )
            return
        if any(isinstance(hook, EarlyStoppingHook) for hook in runner.hooks):
            runner.logger.warning(
                "RNGStateHook: mmengine does not save the patience of EarlyStoppingHook, so it starts again"
            )
        same = self._is_same_run(runner, saved)
        state = saved["ranks"][get_rank()] if get_rank() < len(saved["ranks"]) else None
        if state is not None:
            self._check_generators(runner, state)
            restore_random_states(runner, state)
            if same:
                _restore_tensors(unwrap(runner.model), state)
        if not saved["validated"] and is_validation_due(loop, saved["batch"]):
            runner.logger.info("RNGStateHook: the checkpoint was written before its validation, which is run first")
            runner.val_loop.run()
        if not same or state is None:
            return
        # Loading the skipped batches draws random numbers, so restore the states again afterwards.
        restore = partial(restore_random_states, runner, random_states(runner))
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = SkippedFirst(loop, loop.iter, restore)
        elif saved["batch"]:
            runner.logger.info(f"RNGStateHook: skipping {saved['batch']} finished batches of epoch {loop.epoch + 1}")
            skip(loop, saved["batch"], restore)

    def _check_generators(self, runner: Runner, state: dict) -> None:
        """Warn of generators whose state is not restored."""
        own, saved = run_generators(runner), state.get("generators", {})
        lost = sorted(own.keys() ^ saved.keys())
        if runner.train_dataloader.num_workers and runner.train_dataloader.persistent_workers:
            lost += [name for name in sorted(own) if name.startswith("train_dataset")]
        if lost:
            runner.logger.warning(
                f"RNGStateHook: {len(lost)} random generators start again, because persistent workers have copies of "
                f"them, or the checkpoint does not have the same generators: {', '.join(lost[:3])}"
            )

    def _is_same_run(self, runner: Runner, saved: dict) -> bool:
        """Whether processes and epoch length are those of the checkpoint; warns if not."""
        for what, before, now in (
            ("processes", saved["world_size"], get_world_size()),
            ("batches per epoch", saved["epoch_length"], _epoch_length(runner)),
        ):
            if before != now:
                rest = f"; {saved['batch']} finished batches are repeated" if saved["batch"] else ""
                runner.logger.warning(
                    f"RNGStateHook: the checkpoint was written with {before} {what}, this run has {now}: weights, "
                    "optimizer and schedules are restored, but batches, random numbers and batch norm statistics "
                    f"(except rank 0's) differ from an uninterrupted run{rest}"
                )
                return False
        return True


def _epoch_length(runner: Runner) -> int | None:
    try:
        return len(runner.train_dataloader)
    except TypeError:  # an iterable dataset has no length
        return None


def _state(runner: Runner) -> dict:
    """State of this rank, in plain values and tensors, which ``torch.load(weights_only=True)`` reads."""
    model = unwrap(runner.model)
    return random_states(runner) | {
        # Empty unless gradients are being accumulated.
        "gradients": {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None},
        "buffers": {name: value.cpu() for name, value in model.named_buffers()} if get_world_size() > 1 else {},
    }


@torch.no_grad()
def _restore_tensors(model: nn.Module, state: dict) -> None:
    """Restore the accumulated gradients and the buffers of this rank."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, value in state["gradients"].items():
        parameters[name].grad = value.to(parameters[name].device, copy=True)
    for name, value in state["buffers"].items():
        buffers[name].copy_(value)
