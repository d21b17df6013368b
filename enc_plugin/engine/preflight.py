"""Checks before training that the guard hook, the runner and the doctor use."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from ..build import NO_SAMPLES, named_parts
from ..functional.checks import check_integer, check_type
from ..layers import ENC_LAYERS
from ..measuring.batches import learns_nothing
from ..measuring.pipelines import sample_of
from ..measuring.untouched import unwrap
from ..refused import Refused, describe
from ..surgery.projected import constrained_layers

_IGNORED = -100  # label that torch's cross entropy ignores


def check_work_dir(work_dir: str | Path) -> None:
    """Create the work dir, and raise if it cannot be written to.

    Args:
        work_dir: Folder for logs and checkpoints.

    Raises:
        TypeError: If it is not a path.
        ValueError: If there is a file of this name, or the disk is full or read-only.
    """
    check_type("work_dir", work_dir, (str, Path), "a folder's path")
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir) as file:
            file.write(bytes(1 << 16))  # an empty file can be created even on a full disk
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (Path(work_dir), *Path(work_dir).parents) if path.exists())
        raise ValueError(f"work_dir: {file} is a file, not a folder; choose another work_dir") from error
    except OSError as error:
        raise ValueError(
            f"work_dir: {work_dir} cannot be written to ({error.strerror}); free disk space or choose another work_dir"
        ) from error


def check_loop(train_cfg: Mapping | None) -> None:
    """Raise for numbers of epochs and intervals with which mmengine would fail after the first epoch.

    Args:
        train_cfg: Argument of the runner; not checked unless it is a mapping.

    Raises:
        TypeError: If one is not an integer.
        ValueError: If one is below 1.
    """
    if isinstance(train_cfg, Mapping):
        for name in ("max_epochs", "max_iters", "val_interval", "val_begin"):
            if train_cfg.get(name) is not None:
                check_integer(f"train_cfg.{name}", train_cfg[name], 1)


def check_schedules(param_scheduler: Any, lengths: Mapping[str, int]) -> None:
    """Raise for a schedule that begins when training ends, because mmengine's error names neither of them.

    Args:
        param_scheduler: Argument of the runner: one schedule or a list; not checked unless they are mappings.
        lengths: ``epochs`` and ``iters`` of the training.

    Raises:
        ValueError: If a schedule without an end begins after the last epoch (or iteration).
    """
    schedules = param_scheduler if isinstance(param_scheduler, Sequence) else [param_scheduler]
    for number, schedule in enumerate(schedules):
        if not isinstance(schedule, Mapping) or "end" in schedule:
            continue
        unit = "epochs" if schedule.get("by_epoch", True) else "iters"
        begin, length = schedule.get("begin", 0), lengths[unit]
        if begin >= length:
            kind = getattr(schedule.get("type"), "__name__", schedule.get("type"))
            raise Refused(
                f"param_scheduler: {kind} begins after {begin} {unit}, but training ends after {length}",
                f"train longer, or let it begin earlier (param_scheduler.{number}.begin), and end the warmup before it "
                "there, too",
            )


def check_room(runner: Runner) -> None:
    """Raise ``ValueError`` if the disk of the work dir has no space for one checkpoint."""
    saves = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    tensors = unwrap(runner.model).state_dict().values()
    needed = sum(t.numel() * t.element_size() for t in tensors) * (1 + any(hook.save_optimizer for hook in saves))
    free = shutil.disk_usage(runner.work_dir).free
    if saves and free < needed:
        raise ValueError(
            f"work_dir: {runner.work_dir} has {free / 1e6:.1f} MB free, and a checkpoint takes about "
            f"{needed / 1e6:.1f} MB; free disk space or choose another work_dir"
        )


def find_labels(name: str, dataset: Dataset, num_classes: int | None) -> list[str]:
    """Check the labels of a dataset.

    Args:
        name: Name of the dataloader for errors, such as ``'train_dataloader'``.
        dataset: Dataset of mmengine or mmpretrain; for others, only the length is checked.
        num_classes: Number of classes of the model (:func:`number_of_classes`); None: unknown.

    Returns:
        Warnings about labels that are unusual, but can be trained on.

    Raises:
        ValueError: If there is no sample, or a label is not a number or out of range.
    """
    if not len(dataset):
        raise Refused(f"{name}: {NO_SAMPLES}")
    if not hasattr(dataset, "get_data_info"):
        return []
    seen: dict[int, int] = {}
    for index in range(len(dataset)):
        labels = dataset.get_data_info(index).get("gt_label")
        if labels is None:
            return []
        for label in tree_leaves(labels.tolist() if hasattr(labels, "tolist") else labels):
            seen.setdefault(label, index)
    named = len((getattr(dataset, "metainfo", None) or {}).get("classes") or ())
    surplus = f"{named} classes in the data, model.head.num_classes = {num_classes}"
    for label, index in seen.items():
        if not isinstance(label, (int, float)):
            raise Refused(f"{name}: expected labels that are numbers, got {label!r} (sample {index})")
        if num_classes is not None and label != _IGNORED and not 0 <= label < num_classes:
            number = named if named > max(num_classes, label) else "the number of the dataset's classes"
            raise Refused(
                f"{name}: expected labels from 0 to {num_classes - 1}, because the head has num_classes={num_classes}, "
                f"got {label} (sample {index}){f'; {surplus}' if named > num_classes else ''}",
                f"set num_classes={number} in model.head and in data_preprocessor",
            )
    notes = []
    if num_classes is not None and named > num_classes:
        notes.append(f"{name}: {surplus}; the labels fit, so the other classes have no samples")
    if len(seen) == 1:
        notes.append(f"all {len(dataset)} samples of {name} are of class {next(iter(seen))}")
    return notes


def check_readable(name: str, dataset: Dataset) -> None:
    """Read the first and the last sample through copies of the transforms.

    Raises:
        ValueError: If one cannot be read.
    """
    for index in sorted({0, len(dataset) - 1}):
        try:
            sample_of(dataset, index)
        except Exception as error:
            raise Refused(
                f"{name}: sample {index} cannot be read ({describe(error)})",
                f"check {name}.dataset: its paths and its pipeline",
            ) from error


def number_of_classes(model: nn.Module) -> int | None:
    """Number of classes of the model's head; None if it has none, or a single output (binary labels or regression).

    Raises:
        ValueError: If there is one class, so that the loss gives no gradient.
    """
    head = getattr(model, "head", None)
    number = getattr(head, "num_classes", None)
    if number != 1:
        return number
    if learns_nothing(head):
        raise ValueError(
            "num_classes: expected at least 2, got 1: the softmax of one output is always 1, so there is nothing to "
            "train"
        )
    return None


def check_metrics(name: str, metrics: Iterable[Any], num_classes: int | None) -> None:
    """Raise ``ValueError`` for top-k metrics with k above the number of classes, which fail in the first validation.

    Args:
        name: Name of the evaluator for errors, such as ``'val_evaluator'``.
        metrics: Metrics, or their configs.
        num_classes: Number of classes of the model; None: unknown.
    """
    for metric in metrics:
        topk = metric.get("topk") if isinstance(metric, Mapping) else getattr(metric, "topk", None)
        largest = max((topk,) if isinstance(topk, int) else topk or (), default=0)
        if num_classes is not None and largest > num_classes:
            raise Refused(
                f"{name} asks for the top {largest} of {num_classes} classes",
                "set dict(topk=1) for val_evaluator and test_evaluator",
            )


def check_is_enc(cfg: Config, model: nn.Module) -> None:
    """Raise ``ValueError`` if the config names an ENC model or layer, but the model has no ENC layer."""
    own = {"ENCImageClassifier", *(layer.__name__ for layer in ENC_LAYERS.values())}
    asked = sorted({name for _, name in named_parts(cfg.get("model")) if name.split(".")[-1] in own})
    if asked and next(constrained_layers(model), None) is None:
        raise Refused(
            f"the config names {', '.join(asked)}, but no layer of the network is ENC",
            'use model = dict(type="ENCImageClassifier"), which converts every layer',
        )


def why_step_fails(model: nn.Module, batch: Any) -> str:
    """Advice for a step that fails on ``batch``, as the data loader returns it; empty if the features are right."""
    try:
        inputs = model.data_preprocessor(batch)["inputs"]
    except Exception:
        return (
            "data_preprocessor does not take such batches: check it, the last step of the pipeline, and collate_fn of "
            "the dataloader (mmpretrain's tools set dict(type='default_collate'))"
        )
    wanted = getattr(getattr(model, "head", None), "in_channels", None)
    try:
        features = model.eval().extract_feat(inputs)
        given = (features[-1] if isinstance(features, (tuple, list)) else features).shape[1]
    except Exception:  # the network fails before its head
        return "check that backbone, neck and head fit together"
    if isinstance(wanted, int) and wanted != given:
        return f"the head expects {wanted} channels, but gets {given}: set model.head.in_channels={given}"
    return ""
