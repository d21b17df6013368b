"""Hook that checks data and settings before the first step, and stops a run that has diverged."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner, find_latest_checkpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..functional.checks import check_type
from ..measuring.batches import check_batches, check_penalty
from ..measuring.ranks import on_all_ranks
from ..measuring.untouched import statistics_note, untouched, unwrap
from .diagnosis import are_finite, constants, find_cause, trained
from .limits import check_decay_schedules, tell_many_workers
from .preflight import check_is_enc, check_metrics, check_readable, check_room, find_labels, number_of_classes
from .unread_step import UnreadStep
from .watched import check_watched
from .wrappers import optim_wrappers


@HOOKS.register_module()
class ENCGuardHook(Hook):
    """Raises an error before training if it cannot work, and stops a run that has diverged.

    Before training, validation and testing, it raises an error for a dataset without samples, labels that are not
    classes of the head, a last batch of one image that leaves a batch norm one value per channel, a GBR penalty that
    cannot be differentiated, ``save_best``, early stopping or ``ReduceOnPlateauLR`` that uses a scalar which will not
    be logged, a schedule that gives biases weight decay, and a work dir without space for a checkpoint. It warns of a
    dataset with a single class. It reads every label once, which takes about ten seconds for a million samples. The
    error is raised in all processes.

    In training, a NaN or infinite gradient or loss stops the run, with the weights from before the step. The error
    names the layer where the values first became NaN or infinite, and the last checkpoint. Before each checkpoint, the
    hook checks all tensors that training changes, so that no checkpoint contains such values; other buffers (masks,
    observers) may be infinite. Steps that a gradient scaler skips do not count. On a GPU the step is taken, and undone
    if its gradients were not finite. The host reads that at the end of the iteration, when mmengine waits for the loss
    anyway.

    Training with and without the hook gives the same weights bit for bit, on a GPU with
    ``randomness=dict(deterministic=True)``. ``default_hooks=dict(enc_guard=None)`` turns it off.

    Args:
        data: Whether to check datasets, labels and batch sizes.
        finite: Whether to check gradients, losses and weights. This costs one pass over the gradients per step, and on
            a GPU a copy of the weights until the end of the iteration.
    """

    priority = "HIGH"  # before anything that measures or saves

    def __init__(self, data: bool = True, finite: bool = True):
        check_type("data", data, bool, "True or False")
        check_type("finite", finite, bool, "True or False")
        self.data = data
        self.finite = finite
        self.batch: Any = None  # the last one
        self.first_iter = 0
        self._step = ""  # epoch and iteration of the batch
        self._checked: list[Dataset] = []
        self._nan_at_start: set[str] = set()
        self._unread: list[UnreadStep] = []  # steps of this iteration

    def before_train(self, runner: Runner) -> None:
        """Check data, settings and work dir, and register the check of gradients with the optimizers."""
        check_watched(runner)
        check_decay_schedules(runner)
        model = unwrap(runner.model)
        self.first_iter = runner.iter
        check_is_enc(runner.cfg, model)
        loader = getattr(runner.train_loop, "dataloader", None)  # custom loops may have none
        if isinstance(loader, DataLoader):
            if self.data:
                self._check_data(runner, "train", runner.train_loop)
                by_iter = isinstance(runner.train_loop, IterBasedTrainLoop)
                check_batches(loader, model, runner.max_iters if by_iter else None)
            check_penalty(loader, model, bool(runner.cfg.get("compile")))
        if self.data and runner.val_loop is not None:
            self.before_val(runner)
        tell_many_workers(runner)
        on_all_ranks(lambda: check_room(runner) if is_main_process() else None)
        self._nan_at_start = {name for name, tensor in constants(model) if tensor.isnan().any()}
        if self.finite:
            for wrapper in optim_wrappers(runner):
                wrapper.optimizer.register_step_pre_hook(
                    lambda optimizer, args, kwargs: self._check_gradients(runner, optimizer)
                )

    def before_val(self, runner: Runner) -> None:
        """Check the validation set, once."""
        if self.data:
            self._check_data(runner, "val", runner.val_loop)

    def before_val_epoch(self, runner: Runner) -> None:
        """Warn if running statistics do not fit the weights yet."""
        note = statistics_note(unwrap(runner.model))
        if note:
            runner.logger.warning(f"ENC: the validated network is {note}")

    def before_test(self, runner: Runner) -> None:
        """Check the test set."""
        check_is_enc(runner.cfg, unwrap(runner.model))
        if self.data:
            self._check_data(runner, "test", runner.test_loop)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Keep the batch and its place in the run, for the message of an error."""
        self.batch = data_batch
        self._step = f"epoch {runner.epoch + 1}, iteration {runner.iter + 1}"

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        """Stop if a gradient or the loss is not finite."""
        if not self.finite:
            return
        # mmengine has just read the loss to log it, so the device is idle and these reads do not wait.
        steps, self._unread = self._unread, []
        if not all(step.is_finite() for step in steps):
            for step in reversed(steps):
                step.undo()
            self._stop(runner, "a gradient")
        loss = (outputs or {}).get("loss")
        if isinstance(loss, Tensor) and not math.isfinite(loss.item()):
            self._stop(runner, "the loss")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Stop if what training has changed is not finite; nothing is written then."""
        if not self.finite or self.batch is None:
            return
        model = unwrap(runner.model)
        became_nan = any(t.isnan().any() for name, t in constants(model) if name not in self._nan_at_start)
        if became_nan or not are_finite(tensor for _, tensor in trained(model)):
            self._stop(runner, "a weight or a running statistic")

    def _check_data(self, runner: Runner, split: str, loop: BaseLoop) -> None:
        """Check labels, two samples and metrics of a split, once for each dataset."""
        loader, model = getattr(loop, "dataloader", None), unwrap(runner.model)
        dataset = getattr(loader, "dataset", None)
        if dataset is None or isinstance(dataset, IterableDataset) or any(dataset is known for known in self._checked):
            return
        self._checked.append(dataset)

        def look() -> list[str]:
            classes = number_of_classes(model)
            check_metrics(f"{split}_evaluator", getattr(getattr(loop, "evaluator", None), "metrics", []), classes)
            notes = find_labels(f"{split}_dataloader", dataset, classes)
            check_readable(f"{split}_dataloader", dataset)
            return notes

        with untouched(model):
            notes = on_all_ranks(look)
        for note in notes:
            runner.logger.warning(f"ENC: {note}")

    def _check_gradients(self, runner: Runner, optimizer: torch.optim.Optimizer) -> None:
        # A gradient scaler has found_inf set: the fused optimizer skips steps with infinite gradients itself.
        if getattr(optimizer, "found_inf", None) is not None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p.device.type != "cpu" for p in parameters):
            self._unread.append(UnreadStep(parameters))
        elif not are_finite(p.grad for p in parameters):
            self._stop(runner, "a gradient")

    def _stop(self, runner: Runner, what: str) -> None:
        last = find_latest_checkpoint(runner.work_dir)
        way_out = "no checkpoint has been written yet" if last is None else f"the last checkpoint is {last} (--resume)"
        raise FloatingPointError(
            f"training: {what} is NaN or infinite in {self._step}; "
            f"{find_cause(runner, self.batch)}. This step was not saved, {way_out}. Usual causes: a high learning rate "
            "(lr, warm-up), no gradient clipping (optim_wrapper=dict(clip_grad=dict(max_norm=...))), damaged images or "
            "labels. To train on regardless: default_hooks=dict(enc_guard=None)"
        )
