"""Hook that lets a resumed run go on exactly as if it had not been stopped."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from mmengine.dist import gather_object, get_rank, get_world_size
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from ..measuring.untouched import unwrap
from .generators import Generator, get_state, owned_generators, set_state


@HOOKS.register_module()
class RNGStateHook(Hook):
    """Stores in every checkpoint what a resumed run needs to be the unbroken one, bit for bit, and restores it.

    mmengine's checkpoints hold weights, optimizer, schedules and log histories. This hook adds, as ``rng_state``, for
    each rank: the random states of Python, NumPy, torch and all CUDA devices, and those of generators that datasets,
    transforms, samplers and the model own; gradients that are being accumulated; and the buffers that differ from rank
    0's (batch norm statistics). Beside them: how many batches of the epoch are done, and whether the validation that
    was due has been. A resumed run then

    - validates first, if the checkpoint was written before a validation that was due. No metric is lost to a crash,
      best checkpoints and plateau schedules are those of the unbroken run; a run that was stopped after the validation
      repeats it, with the same values;
    - skips the batches that are done, where the checkpoint is from within an epoch (``by_epoch=False``): they are
      loaded and dropped, so that what follows draws what it would have drawn.

    What holds with :class:`ENCRunner`, on one process and several, for equal configs, software and hardware and as far
    as the operators themselves are deterministic: weights, optimizer state and logged scalars (but for times) equal
    those of the unbroken run

    - without workers, and with any number of workers, persistent or not, for epochs (the runner seeds workers by epoch:
      :func:`~enc_plugin.engine.worker_seeds.seed_workers_by_epoch`) and for iterations as mmengine counts them;
    - not for what workers draw under a ``worker_init_fn`` of one's own, or persistent ones under a sampler without
      ``set_epoch`` or in validation, which is told no epoch;
    - not for generators of a dataset's own in persistent workers (a warning), where each worker has a copy;
    - not on another number of processes or with epochs of another length: a warning says what differs;
    - not for the patience of ``EarlyStoppingHook``, which mmengine does not store (a warning, too).

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
        if not saved["validated"] and _is_validation_due(loop, saved["batch"]):
            runner.logger.info("RNGStateHook: the checkpoint is from before its validation, which comes first")
            runner.val_loop.run()
        if not same or state is None:
            return
        # Loading the batches that are skipped draws random numbers.
        restore = partial(_restore_rng, runner, _rng_state(runner))
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _SkippedFirst(loop, loop.iter, restore)
        elif saved["batch"]:
            runner.logger.info(
                f"RNGStateHook: {saved['batch']} batches of epoch {loop.epoch + 1} are done, and skipped"
            )
            _skip(loop, saved["batch"], restore)

    def _check_generators(self, runner: Runner, state: dict) -> None:
        """Warn of generators that will not go on where they stopped."""
        own, saved = _generators(runner), state.get("generators", {})
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
    return _rng_state(runner) | {
        # Between updates there are none, unless they are being accumulated.
        "gradients": {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None},
        "buffers": {name: value.cpu() for name, value in model.named_buffers()} if get_world_size() > 1 else {},
    }


def _restore(runner: Runner, state: dict, tensors: bool) -> None:
    """Restore a rank's random state, and its own gradients and buffers if ``tensors``."""
    _restore_rng(runner, state)
    if not tensors:
        return
    model = unwrap(runner.model)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    with torch.no_grad():
        for name, value in state["gradients"].items():
            parameters[name].grad = value.to(parameters[name].device, copy=True)
        for name, value in state["buffers"].items():
            buffers[name].copy_(value)


def _generators(runner: Runner) -> dict[str, Generator]:
    """Generators that belong to what is trained and validated with."""
    roots = {"model": unwrap(runner.model)}
    for name, loop in (("train", runner._train_loop), ("val", runner._val_loop)):
        if isinstance(loop, BaseLoop):
            loader = loop.dataloader
            roots |= {f"{name}_dataset": loader.dataset, f"{name}_collate": loader.collate_fn}
            roots |= {f"{name}_sampler": loader.sampler, f"{name}_batch_sampler": loader.batch_sampler}
    return owned_generators(**roots)


def _rng_state(runner: Runner) -> dict:
    name, keys, *rest = np.random.get_state()
    return {
        "generators": {name: get_state(generator) for name, generator in _generators(runner).items()},
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _restore_rng(runner: Runner, state: dict) -> None:
    for name, generator in _generators(runner).items():
        if name in state.get("generators", {}):
            set_state(generator, state["generators"][name])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())  # a resumed checkpoint is loaded to the training device
    if torch.cuda.is_available():
        for device, value in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(value.cpu(), device)


def _is_validation_due(loop: BaseLoop, batch: int) -> bool:
    """Whether ``loop`` validates at this point before it trains on."""
    if isinstance(loop, IterBasedTrainLoop):
        done, last = loop.iter, loop.max_iters
    elif isinstance(loop, EpochBasedTrainLoop) and batch == 0:
        done, last = loop.epoch, loop.max_epochs
    else:
        return False
    if loop.runner.val_loop is None:
        return False
    loop._decide_current_val_interval()
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)


def _skip(loop: EpochBasedTrainLoop, batches: int, then: Callable[[], None]) -> None:
    """Let ``loop`` drop its next ``batches`` batches, and call ``then`` before it loads the one behind them."""
    run_iter = loop.run_iter

    def drop(idx: int, data_batch) -> None:
        if idx + 1 == batches:
            loop.run_iter = run_iter
            then()

    loop.run_iter = drop


class _SkippedFirst:
    """Batches of a resumed ``IterBasedTrainLoop``, which drops the first ones itself: ``then`` is called after that."""

    def __init__(self, loop: IterBasedTrainLoop, batches: int, then: Callable[[], None]):
        self._loop = loop
        self._batches = loop.dataloader_iterator
        self._left = batches
        self._then = then

    def skip_iter(self, batches: int) -> None:
        """What onedl-mmengine drops them by: loading, so that workers and transforms draw what they had drawn."""
        for _ in range(batches):
            next(self)

    def __next__(self):
        if self._left == 0:
            self._loop.dataloader_iterator = self._batches
            self._then()
        self._left -= 1
        return next(self._batches)
