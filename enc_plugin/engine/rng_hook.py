"""Hook that lets a resumed run go on exactly as if it had not been stopped."""

from __future__ import annotations

from functools import partial

import torch
from mmengine.dist import gather_object, get_rank, get_world_size
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from ..measuring.untouched import unwrap
from .generators import random_states, restore_random_states, run_generators
from .position import SkippedFirst, is_validation_due, skip


@HOOKS.register_module()
class RNGStateHook(Hook):
    """Saves enough state in each checkpoint that a resumed run is bit-for-bit identical to an uninterrupted one.

    mmengine's checkpoints hold weights, optimizer, schedules and log histories. This hook adds an entry ``rng_state``.
    For each rank it holds the random states of Python, NumPy, torch and all CUDA devices, those of generators that
    datasets, transforms, samplers and the model own, gradients that are being accumulated, and the buffers that differ
    from rank 0's (batch norm statistics). It also holds the number of batches of the epoch that are done, and whether
    the validation that was due is done. A resumed run

    - validates first, if the checkpoint was written before a validation that was due. So a crash loses no metric, and
      best checkpoints and plateau schedules are those of the uninterrupted run. A run that was stopped after the
      validation repeats it, with the same values;
    - skips the batches that are done, if the checkpoint is from within an epoch (``by_epoch=False``): it loads and
      drops them, so that all later random numbers are the same.

    With :class:`ENCRunner`, equal configs, software and hardware, and deterministic operators (on a GPU that takes
    ``randomness=dict(deterministic=True)``), weights, optimizer state and logged scalars (but for times) equal those of
    the uninterrupted run, on one process and on several

    - without workers, and with any number of workers, persistent or not, for epochs (the runner seeds workers by epoch:
      :func:`~enc_plugin.engine.worker_seeds.seed_workers_by_epoch`) and for iterations as mmengine counts them;
    - but not with a ``worker_init_fn`` of your own, and not with persistent workers under a sampler without
      ``set_epoch``, or in validation, which is told no epoch;
    - not for a dataset's own generators in persistent workers, because each worker has a copy (a warning says so);
    - not on another number of processes or with epochs of another length (a warning says what differs);
    - not for the patience of ``EarlyStoppingHook``, because mmengine does not store it (a warning says so).

    Without ENCRunner only rank 0's state is stored.
    """

    priority = "LOWEST"  # before_train: once nothing else draws; before_save_checkpoint: once all others have

    def __init__(self):
        self._ranks: list[dict] | None = None
        self._saved: dict | None = None
        self._batch = 0
        self._validating = False

    def gather(self, runner: Runner) -> None:
        """Collect the states of all ranks for the checkpoint that is about to be written; every rank has to call it."""
        self._ranks = gather_object(_state(runner))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Note the position in the epoch."""
        self._batch = batch_idx + 1

    def before_val(self, runner: Runner) -> None:
        """Note that what is saved from now on knows the metrics."""
        self._validating = True

    def after_val(self, runner: Runner) -> None:
        """Note the end of the validation."""
        self._validating = False

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the states."""
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
        """Restore the states, make up for a validation, and go to the position in the epoch."""
        loop, saved, self._saved = runner.train_loop, self._saved, None
        if loop.iter == 0:  # nothing has been resumed
            return
        if saved is None:
            runner.logger.warning(
                "RNGStateHook: the checkpoint holds no random states (it was written without this hook); training goes "
                "on with other random numbers than an unbroken run"
            )
            return
        if any(isinstance(hook, EarlyStoppingHook) for hook in runner.hooks):
            runner.logger.warning(
                "RNGStateHook: mmengine does not store the patience of EarlyStoppingHook: it starts anew"
            )
        same = self._is_same_run(runner, saved)
        state = saved["ranks"][get_rank()] if get_rank() < len(saved["ranks"]) else None
        if state is not None:
            self._check_generators(runner, state)
            _restore(runner, state, tensors=same)
        if not saved["validated"] and is_validation_due(loop, saved["batch"]):
            runner.logger.info("RNGStateHook: the checkpoint is from before its validation, which comes first")
            runner.val_loop.run()
        if not same or state is None:
            return
        # Loading the batches that are skipped draws random numbers.
        restore = partial(restore_random_states, runner, random_states(runner))
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = SkippedFirst(loop, loop.iter, restore)
        elif saved["batch"]:
            runner.logger.info(
                f"RNGStateHook: {saved['batch']} batches of epoch {loop.epoch + 1} are done, and skipped"
            )
            skip(loop, saved["batch"], restore)

    def _check_generators(self, runner: Runner, state: dict) -> None:
        """Warn of generators that will not go on where they stopped."""
        own, saved = run_generators(runner), state.get("generators", {})
        lost = sorted(own.keys() ^ saved.keys())
        if runner.train_dataloader.num_workers and runner.train_dataloader.persistent_workers:
            lost += [name for name in sorted(own) if name.startswith("train_dataset")]
        if lost:
            runner.logger.warning(
                f"RNGStateHook: {len(lost)} random generators start anew, because persistent workers have copies of "
                f"their own, or the checkpoint does not have the same ones: {', '.join(lost[:3])}"
            )

    def _is_same_run(self, runner: Runner, saved: dict) -> bool:
        """Whether this run can go on exactly; a warning if not."""
        for what, before, now in (
            ("processes", saved["world_size"], get_world_size()),
            ("batches an epoch", saved["epoch_length"], _epoch_length(runner)),
        ):
            if before != now:
                rest = f"; the {saved['batch']} batches that are done come again" if saved["batch"] else ""
                runner.logger.warning(
                    f"RNGStateHook: the checkpoint was written with {before} {what}, this run has {now}: weights, "
                    "optimizer and schedules are restored, but batches, random numbers and (but for rank 0's) batch "
                    f"norm statistics are not those of an unbroken run{rest}"
                )
                return False
        return True


def _epoch_length(runner: Runner) -> int | None:
    try:
        return len(runner.train_dataloader)
    except TypeError:  # a dataset without a length, trained on by iterations
        return None


def _state(runner: Runner) -> dict:
    """What this rank needs: plain values and tensors, which ``torch.load(weights_only=True)`` reads."""
    model = unwrap(runner.model)
    return random_states(runner) | {
        # Between updates there are none, unless they are being accumulated.
        "gradients": {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None},
        "buffers": {name: value.cpu() for name, value in model.named_buffers()} if get_world_size() > 1 else {},
    }


def _restore(runner: Runner, state: dict, tensors: bool) -> None:
    """Restore a rank's random state, and its own gradients and buffers if ``tensors``."""
    restore_random_states(runner, state)
    if not tensors:
        return
    model = unwrap(runner.model)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    with torch.no_grad():
        for name, value in state["gradients"].items():
            parameters[name].grad = value.to(parameters[name].device, copy=True)
        for name, value in state["buffers"].items():
            buffers[name].copy_(value)
