"""Hook that refuses before the first step what would fail later, and stops a run that has diverged."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner, find_latest_checkpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..functional.checks import check_type
from ..measuring.batches import check_batches, check_penalty
from ..measuring.ranks import on_all_ranks
from ..measuring.untouched import statistics_note, untouched, unwrap
from .diagnosis import are_finite, constants, find_cause, trained
from .preflight import check_is_enc, check_metrics, check_readable, check_room, find_labels, number_of_classes
from .unread_step import UnreadStep
from .watched import check_watched
from .wrappers import optim_wrappers


@HOOKS.register_module()
class ENCGuardHook(Hook):
    """Refuses data that cannot be trained on before training starts, and stops a run that has diverged.

    Before training, validation and test it raises an error for a dataset without samples, labels that are no class of
    the head, a last batch of one image where a batch norm gets one value per channel, a GBR penalty that cannot be
    differentiated, a watcher (``save_best``, early stopping, ``ReduceOnPlateauLR``) of a scalar that will not be there,
    and a work dir without room for one checkpoint. It warns of a dataset with a single class. It reads every label once
    for this, which takes about ten seconds for a million. All processes refuse together.

    In training, gradients that are NaN or infinite stop the run. The weights are those from before the step, and the
    error names the layer where it began and the last checkpoint. Before each checkpoint it looks at all that training
    changes, so that no checkpoint holds such values. Other buffers (masks, observers) may be infinite. A loss that is
    not finite stops the run, too; a step that a gradient scaler skips does not. On a GPU the step goes ahead and is
    undone if its gradients were not finite: the host reads that at the end of the iteration, where mmengine waits for
    the loss.

    Training with and without the hook gives the same weights bit for bit, on a GPU with
    ``randomness=dict(deterministic=True)``.
    ``default_hooks=dict(enc_guard=None)`` turns it off.

    Args:
        data: Whether to look at datasets, labels and batch sizes.
        finite: Whether to look at gradients, losses and weights. It costs a pass over the gradients each step; on a GPU
            also a copy of the weights, which is kept until the end of the iteration.
    """

    priority = "HIGH"  # before anything that measures or saves

    def __init__(self, data: bool = True, finite: bool = True):
        check_type("data", data, bool, "True or False")
        check_type("finite", finite, bool, "True or False")
        self.data = data
        self.finite = finite
        self.batch: Any = None  # the last one
        self.first_iter = 0
        self._checked: list[Dataset] = []
        self._nan_at_start: set[str] = set()
        self._unread: list[UnreadStep] = []  # steps of this iteration

    def before_train(self, runner: Runner) -> None:
        """Look at the data and the work dir, and watch the optimizers."""
        check_watched(runner)
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
        on_all_ranks(lambda: check_room(runner) if is_main_process() else None)
        self._nan_at_start = {name for name, tensor in constants(model) if tensor.isnan().any()}
        if self.finite:
            for wrapper in optim_wrappers(runner):
                wrapper.optimizer.register_step_pre_hook(
                    lambda optimizer, args, kwargs: self._check_gradients(runner, optimizer)
                )

    def before_val(self, runner: Runner) -> None:
        """Look at the validation set, once."""
        if self.data:
            self._check_data(runner, "val", runner.val_loop)

    def before_val_epoch(self, runner: Runner) -> None:
        """Warn of running statistics that do not fit the weights yet."""
        note = statistics_note(unwrap(runner.model))
        if note:
            runner.logger.warning(f"ENC: what is validated is {note}")

    def before_test(self, runner: Runner) -> None:
        """Look at the test set."""
        check_is_enc(runner.cfg, unwrap(runner.model))
        if self.data:
            self._check_data(runner, "test", runner.test_loop)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Remember the batch, to look for the cause in it."""
        self.batch = data_batch

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        """Stop at a loss that is not finite, and at weights that are not before they are saved."""
        if not self.finite:
            return
        # mmengine has read the loss to log it: the device is idle, so these reads wait for nothing.
        steps, self._unread = self._unread, []
        if not all(step.is_finite() for step in steps):
            for step in reversed(steps):
                step.undo()
            self._stop(runner, "a gradient")
        loss = (outputs or {}).get("loss")
        if isinstance(loss, Tensor) and not math.isfinite(loss.item()):
            self._stop(runner, "the loss")
        for hook in runner.hooks:
            if (
                isinstance(hook, CheckpointHook)
                and not hook.by_epoch
                and hook.every_n_train_iters(runner, hook.interval)
            ):
                self._check_weights(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Stop before weights that are not finite are saved."""
        if self.finite:
            self._check_weights(runner)

    def _check_data(self, runner: Runner, split: str, loop: BaseLoop) -> None:
        """Look at the labels of a split, read two of its samples, and compare its metrics with the classes, once."""
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
        # Fused optimizers skip the step of an infinite gradient themselves, where a gradient scaler asks for it.
        if getattr(optimizer, "found_inf", None) is not None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p.device.type != "cpu" for p in parameters):
            self._unread.append(UnreadStep(parameters))
        elif not are_finite(p.grad for p in parameters):
            self._stop(runner, "a gradient")

    def _check_weights(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        became_nan = any(t.isnan().any() for name, t in constants(model) if name not in self._nan_at_start)
        if became_nan or not are_finite(tensor for _, tensor in trained(model)):
            self._stop(runner, "a weight or a running statistic")

    def _stop(self, runner: Runner, what: str) -> None:
        last = find_latest_checkpoint(runner.work_dir)
        way_out = "no checkpoint has been written yet" if last is None else f"the last checkpoint is {last} (--resume)"
        raise FloatingPointError(
            f"training: {what} is NaN or infinite in epoch {runner.epoch + 1}, iteration {runner.iter + 1}; "
            f"{find_cause(runner, self.batch)}. Nothing of this step was saved, {way_out}. Usual causes: the "
            "learning rate (lr, warm-up), no gradient clipping (optim_wrapper=dict(clip_grad=dict(max_norm=...))), "
            "pictures or labels that are damaged. default_hooks=dict(enc_guard=None) goes on all the same"
        )
