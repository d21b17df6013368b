"""Guards of a run: what would fail late is refused before the first step, and a run that has diverged stops."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner, find_latest_checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..convert import enc_layers
from ..functional.checks import check_integer, check_type
from ..functional.normalizable import check_normalizable
from ..measuring.batches import check_batches, check_penalty, on_all_ranks
from ..measuring.untouched import statistics_note, untouched, unwrap
from .preflight import check_is_enc, check_metrics, check_readable, find_labels, number_of_classes
from .unread_step import UnreadStep, largest_magnitude
from .watched import check_watched


@HOOKS.register_module()
class ENCGuardHook(Hook):
    """Refuses data that cannot be trained on before training starts, and stops a run that has diverged.

    Before training, and before validation and test: a dataset without samples, labels that are no class of the head, a
    last batch of one image where a batch norm gets one value per channel, a GBR penalty that cannot be differentiated,
    a watcher (``save_best``, early stopping, ``ReduceOnPlateauLR``) of a scalar that will not be there, a work dir
    without room for one checkpoint. A dataset of a single class is warned of. Every label is read once for this, about
    ten seconds for a million. All processes refuse together.

    In training: gradients that are NaN or infinite stop the run with the weights of before the step, the name of the
    layer where it began and the last checkpoint; what training changes is looked at before each checkpoint, so that
    none holds such values. Other buffers (masks, observers) may be infinite. A step that a gradient scaler skips is no
    reason to stop, a loss that is not finite is. On a GPU the step goes ahead, and is undone where its gradients were
    not finite: the host reads that at the end of the iteration, where mmengine waits for the loss.

    It changes nothing: training with and without it gives the same weights, bit by bit.
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
        on_all_ranks(lambda: _check_room(runner) if is_main_process() else None)
        self._nan_at_start = {name for name, tensor in _constants(model) if tensor.isnan().any()}
        if self.finite:
            wrappers = runner.optim_wrapper
            for wrapper in wrappers.values() if hasattr(wrappers, "optim_wrappers") else [wrappers]:
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
        elif not _are_finite(p.grad for p in parameters):
            self._stop(runner, "a gradient")

    def _check_weights(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        became_nan = any(t.isnan().any() for name, t in _constants(model) if name not in self._nan_at_start)
        if became_nan or not _are_finite(tensor for _, tensor in _trained(model)):
            self._stop(runner, "a weight or a running statistic")

    def _stop(self, runner: Runner, what: str) -> None:
        last = find_latest_checkpoint(runner.work_dir)
        way_out = "no checkpoint has been written yet" if last is None else f"the last checkpoint is {last} (--resume)"
        raise FloatingPointError(
            f"training: {what} is NaN or infinite in epoch {runner.epoch + 1}, iteration {runner.iter + 1}; "
            f"{_find_cause(runner, self.batch)}. Nothing of this step was saved, {way_out}. Usual causes: the "
            "learning rate (lr, warm-up), no gradient clipping (optim_wrapper=dict(clip_grad=dict(max_norm=...))), "
            "pictures or labels that are damaged. default_hooks=dict(enc_guard=None) goes on all the same"
        )


def check_work_dir(work_dir: str | Path) -> None:
    """Make the work dir, and refuse one that cannot be written to.

    Args:
        work_dir: Folder for logs and checkpoints.

    Raises:
        TypeError: If it is no path.
        ValueError: If a file is in its place, or the disk is full or read-only.
    """
    check_type("work_dir", work_dir, (str, Path), "a folder's path")
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir) as file:
            file.write(bytes(1 << 16))  # a full disk still takes an empty file
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (Path(work_dir), *Path(work_dir).parents) if path.exists())
        raise ValueError(f"work_dir: {file} is a file, and no folder; name another") from error
    except OSError as error:
        raise ValueError(
            f"work_dir: {work_dir} cannot be written to ({error.strerror}); make room or name another folder"
        ) from error


def check_loop(train_cfg: Mapping | None) -> None:
    """Refuse numbers of epochs and intervals that mmengine would stumble over after the first epoch.

    Args:
        train_cfg: Of the runner; other objects than dicts are left to mmengine.

    Raises:
        TypeError: If one is no integer.
        ValueError: If one is below 1.
    """
    if isinstance(train_cfg, Mapping):
        for name in ("max_epochs", "max_iters", "val_interval", "val_begin"):
            if train_cfg.get(name) is not None:
                check_integer(f"train_cfg.{name}", train_cfg[name], 1)


def _check_room(runner: Runner) -> None:
    """Refuse to start where not even one checkpoint would fit."""
    saves = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    tensors = unwrap(runner.model).state_dict().values()
    needed = sum(t.numel() * t.element_size() for t in tensors) * (1 + any(hook.save_optimizer for hook in saves))
    free = shutil.disk_usage(runner.work_dir).free
    if saves and free < needed:
        raise ValueError(
            f"work_dir: {runner.work_dir} has {free / 1e6:.1f} MB free, and a checkpoint takes about "
            f"{needed / 1e6:.1f} MB; make room or name another folder"
        )


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What training changes: parameters with gradients, and running statistics."""
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for prefix, module in model.named_modules():
        for key in ("running_mean", "running_var"):
            if isinstance(module._buffers.get(key), Tensor):
                yield f"{prefix}.{key}".removeprefix("."), module._buffers[key]


def _constants(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The other tensors of checkpoints; infinite ones are meant so (masks, bounds of observers at the start)."""
    trained = {name for name, _ in _trained(model)}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and name not in trained:
            yield name, value


def _are_finite(tensors: Iterable[Tensor | None]) -> bool:
    largest = largest_magnitude(tensors)
    return largest is None or math.isfinite(largest.item())


def _find_cause(runner: Runner, batch: Any) -> str:
    """Where values stopped being finite: in the batch, the weights, the forward pass, or on the way back."""
    model = unwrap(runner.model)
    inputs = batch.get("inputs") if isinstance(batch, Mapping) else None
    if not all(x.isfinite().all() for x in tree_leaves(inputs) if isinstance(x, Tensor)):
        return f"the batch holds NaN or Inf itself{_pictures(batch)}"
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        return f"{len(broken)} weights hold NaN or Inf: {', '.join(map(repr, broken[:3]))}"
    for name, layer in enc_layers(model):
        try:
            check_normalizable(name, layer.weight, layer.enc_variant, layer.enc_kept)
        except ValueError as error:
            return str(error)
    layer = _first_overflow(runner, model, batch)
    if layer is not None:
        return f"the weights are finite, and the first output that is not is that of {layer}"
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if broken:
        return f"weights and outputs are finite; of the gradients, that of {broken[-1]!r} is the nearest to the loss"
    return "a second pass over the last batch is finite, so chance (augmentation, dropout) or an earlier batch is in it"


@torch.no_grad()
def _first_overflow(runner: Runner, model: nn.Module, batch: Any) -> str | None:
    """The module whose output is the first that is not finite, when the batch goes through once more."""
    found: list[str] = []

    def look(name: str, module: nn.Module, out: Any) -> None:
        # Minus infinity is what masks put out.
        if not found and not all((t < math.inf).all() for t in tree_leaves(out) if isinstance(t, Tensor)):
            found.append(f"{name!r} ({type(module).__name__})")

    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: look(name, module, out))
        for name, module in model.named_modules()
        if name
    ]
    try:
        data = model.data_preprocessor(batch, True)
        with runner.optim_wrapper.optim_context(model):
            model(**data, mode="loss")
    except Exception:  # some wrappers' parts do not run alone; what was found counts
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _pictures(batch: Mapping) -> str:
    names = [
        str(sample.get("img_path") or f"number {i} of the batch")
        for i, (x, sample) in enumerate(zip(batch["inputs"], batch["data_samples"], strict=False))
        if not x.isfinite().all()
    ]
    return f" ({', '.join(names[:3])})" if names else ""
