"""Accuracy of trained checkpoints under attack, side by side: table, JSON, curve and pictures."""

from __future__ import annotations

from ..installation import needs_mmpretrain  # noqa: F401

# isort: split
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..build import build_dataset, load_config, load_model, pick_device
from ..checkpoint import file_sha256
from ..functional import fgsm
from ..measuring.pipelines import WithoutReplacement
from ..measuring.pixels import PIXEL_MAX, PixelClassifier, collate_pixels
from ..measuring.robustness import Robustness, check_pixel_eps, measure_robustness
from ..measuring.spread import spread
from ..measuring.untouched import untouched
from ..refused import Refused, require_file
from ..table import format_table
from ..version import __version__
from . import plot

UNIT = "1/255 of the pixel range"
# Right and wrong differ in mark as well as in colour, and the colours in lightness.
_RIGHT, _WRONG = ("\N{CHECK MARK}", plot.PALETTE[0]), ("\N{BALLOT X}", plot.PALETTE[1])


@dataclass(frozen=True)
class Attacked:
    """One checkpoint and what was measured on it."""

    name: str
    config: str
    checkpoint: str
    sha256: str
    meta: dict
    result: Robustness


@dataclass(frozen=True)
class AttackReport:
    """Checkpoints under attack; ``print`` it for the table with its warnings.

    Attributes:
        runs: One for each checkpoint, in the order given.
        eps: Budgets in 1/255 of the pixel range.
        seed: Of PGD's random starts.
        files: What was written.
    """

    runs: list[Attacked]
    eps: list[float]
    seed: int
    files: list[Path] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """What speaks against taking the accuracies as robustness, with the checkpoint's name."""
        return [f"{run.name}: {warning}" for run in self.runs for warning in run.result.warnings]

    def __str__(self) -> str:
        first = self.runs[0].result
        attacks = [("FGSM", "fgsm")] + ([(f"PGD-{first.pgd_steps}", "pgd")] if first.pgd else [])
        head = [
            "checkpoint",
            "weights",
            "clean",
            *(f"{name} {eps:g}" for name, _ in attacks for eps in self.eps),
            "zero grad",
        ]
        rows = []
        for run in self.runs:
            values = [run.result.clean, *(getattr(run.result, kind)[eps] for _, kind in attacks for eps in self.eps)]
            rows.append(
                [
                    run.name,
                    run.meta.get("weights", "unknown"),
                    *(f"{value:.2f}" for value in values),
                    f"{run.result.zero_grad:.2%}",
                ]
            )
        # The widest standard error that a share of so many samples can have.
        error = 50 / math.sqrt(first.num_samples)
        return "\n".join(
            [
                f"Top-1 accuracy (%) of {first.num_samples} samples (standard error at most {error:.2f}) under attack; "
                f"eps in {UNIT}",
                format_table(head, rows),
                *(f"WARNING: {warning}" for warning in self.warnings),
            ]
        )

    def to_dict(self) -> dict:
        """All figures and what they depend on, ready for JSON."""
        runs = [asdict(run) | {"warnings": run.result.warnings} for run in self.runs]
        for run in runs:
            for attack in ("fgsm", "pgd"):
                run["result"][attack] = {f"{eps:g}": accuracy for eps, accuracy in run["result"][attack].items()}
        return {
            "unit": {"eps": UNIT, "accuracy": "top-1, percent", "zero_grad": "share of the samples"},
            "eps": self.eps,
            "seed": self.seed,
            "enc_plugin": __version__,
            "torch": str(torch.__version__),
            "checkpoints": runs,
        }


def attack_checkpoints(
    checkpoints: Sequence[tuple[str | Path | Config, str | Path]],
    eps: Sequence[float] = (1, 2, 4, 8),
    *,
    pgd_steps: int = 0,
    names: Sequence[str] | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    pictures: int = 6,
    seed: int = 0,
    device: str | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> AttackReport:
    """Attack checkpoints on the test sets of their configs.

    Args:
        checkpoints: Pairs of a config and a checkpoint: of mmengine, a state dict, or a ``.safetensors`` file.
        eps: Budgets in 1/255 of the pixel range.
        pgd_steps: Gradients of PGD for each eps; 0: FGSM alone.
        names: What the table calls them; None: the names of the configs, told apart by their checkpoints where needed.
        num_samples: How many samples, spread evenly over the test set; None: all.
        batch_size: Samples per batch; None: that of the test dataloader.
        num_workers: Processes that load.
        pictures: How many samples are drawn for each checkpoint; 0: none.
        seed: Of PGD's random starts.
        device: Such as ``'cpu'`` or ``'cuda:1'``; None: a GPU if there is one.
        out: Folder for ``attack.json``, ``accuracy.png`` and ``pictures_<name>.png``; None: nothing is written.
        progress: Show a bar for each checkpoint on the terminal (standard error).

    Returns:
        The report.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a checkpoint does not fit its config, the test sets differ in length, names repeat, or an option
            is out of range.
    """
    eps = check_pixel_eps(eps)
    configs = [load_config(config) for config, _ in checkpoints]
    for _, checkpoint in checkpoints:
        require_file("checkpoint", checkpoint)
    names = _names(configs, [path for _, path in checkpoints], names)
    device = pick_device(device)
    splits = [_test_split(config) for config in configs]
    loaders = [config[f"{split}_dataloader"] for config, split in zip(configs, splits, strict=True)]
    datasets = [build_dataset(config, split) for config, split in zip(configs, splits, strict=True)]
    if len({len(dataset) for dataset in datasets}) > 1:
        lengths = ", ".join(f"{name} {len(dataset)}" for name, dataset in zip(names, datasets, strict=True))
        raise ValueError(f"checkpoints: expected one test set for all, got sets of different length: {lengths}")
    out = None if out is None else Path(out)

    report = AttackReport([], eps, seed)
    for name, config, (_, path), loader, dataset in zip(names, configs, checkpoints, loaders, datasets, strict=True):
        model, meta = load_model(config, path)
        model.to(device)
        with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
            task = bar.add_task(name, total=None)
            result = measure_robustness(
                model,
                dataset,
                eps,
                num_samples=num_samples,
                batch_size=batch_size or loader.get("batch_size") or 64,
                num_workers=num_workers,
                pgd_steps=pgd_steps,
                seed=seed,
                progress=lambda done, total, bar=bar, task=task: bar.update(task, completed=done, total=total),
            )
        report.runs.append(Attacked(name, str(config.filename), str(path), file_sha256(path), meta, result))
        if out is not None and pictures:
            file = out / f"pictures_{_file_name(name)}.png"
            draw_pictures(model, dataset, max(eps), file, count=pictures, name=name)
            report.files.append(file)
    if out is not None:
        draw_accuracy({run.name: run.result for run in report.runs}, out / "accuracy.png")
        (out / "attack.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        report.files.extend([out / "accuracy.png", out / "attack.json"])
    return report


def draw_accuracy(results: dict[str, Robustness], path: str | Path) -> None:
    """Draw accuracy against eps, a colour for each checkpoint, FGSM solid and PGD dashed, as a PNG."""
    axes = plot.new_axes(f"L-inf budget eps ({UNIT})", "top-1 accuracy (%)")
    for i, (name, result) in enumerate(results.items()):
        solid = plot.Series(f"{name}, FGSM", *_points(result, result.fgsm))
        plot.draw(axes, solid, i, linestyle="-", clip_on=False)
        if result.pgd:
            dashed = plot.Series(f"{name}, PGD-{result.pgd_steps}", *_points(result, result.pgd))
            plot.draw(axes, dashed, i, linestyle="--", markerfacecolor="white", clip_on=False)
    eps = sorted({0.0, *(eps for result in results.values() for eps in result.fgsm)})
    axes.set(ylim=(0, 100), xticks=eps, xticklabels=[f"{value:g}" for value in eps])
    counts = sorted({result.num_samples for result in results.values()})
    axes.set_title(f"Accuracy under white-box attack, {'/'.join(map(str, counts))} test samples", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    plot.save(plot.to_png(axes.figure), path)


def draw_pictures(
    model: nn.Module, dataset: Dataset, eps: float, path: str | Path, *, count: int = 6, name: str = "model"
) -> None:
    """Draw clean pictures, the same under FGSM, and the amplified difference, with the predictions, as a PNG.

    The samples are spread evenly over the dataset and not chosen by what becomes of them.

    Args:
        model: Classifier of mmpretrain.
        dataset: Its test set, as in :func:`enc_plugin.measuring.robustness.measure_robustness`.
        eps: Budget in 1/255 of the pixel range.
        path: File to write.
        count: How many samples.
        name: What the title calls the model.
    """
    classify, source = PixelClassifier(model), WithoutReplacement(dataset)
    device = next(model.parameters()).device
    classes = dict(getattr(dataset, "metainfo", None) or {}).get("classes")
    with untouched(classify):
        pixels, labels = collate_pixels([source[i] for i in spread(len(dataset), count)])
        pixels, labels = pixels.to(device).float(), labels.to(device)
        attacked = fgsm(classify, pixels, labels, float(eps), upper=PIXEL_MAX)
        shares = [classify(x).softmax(1).cpu() for x in (pixels, attacked)]
    # Mean grey is no change; the largest change that eps allows is black or white.
    difference = (attacked - pixels) * (PIXEL_MAX / 2 / eps) + PIXEL_MAX / 2
    rows = [
        ("clean", pixels),
        (f"FGSM, eps {eps:g}", attacked),
        (f"difference x {PIXEL_MAX / 2 / eps:.3g}\n(grey: no change)", difference),
    ]
    flip = bool(getattr(model.data_preprocessor, "to_rgb", False))
    count = len(labels)
    figure = plot.new_figure((1.6 * count + 1.1, 6.0))
    grid = figure.subplots(3, count, squeeze=False)
    for row, (title, images) in enumerate(rows):
        for column in range(count):
            axes = grid[row][column]
            look = dict(cmap="gray", vmin=0, vmax=1, interpolation="nearest")  # cmap: for one channel
            axes.imshow(_to_image(images[column], flip), **look)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row < 2:
                share, predicted = (value.item() for value in shares[row][column].max(0))
                mark, color = _RIGHT if predicted == labels[column] else _WRONG
                axes.set_title(f"{mark} {_label(classes, predicted)} ({share:.0%})", color=color, fontsize=10)
            else:
                axes.set_xlabel(f"true: {_label(classes, labels[column].item())}", fontsize=10)
        grid[row][0].set_ylabel(title, fontsize=11)
    figure.suptitle(f"{name}: prediction and its probability, clean and under attack (eps in {UNIT})", fontsize=11)
    plot.save(plot.to_png(figure, colors=None), path)


def _points(result: Robustness, accuracies: dict[float, float]) -> tuple[list[float], list[float]]:
    eps = sorted(accuracies)
    return [0.0, *eps], [result.clean, *(accuracies[e] for e in eps)]


def _to_image(pixels: Tensor, flip: bool) -> np.ndarray:
    """Pixels ``(C, H, W)`` in 0..255 as an array for imshow; BGR, which the model itself turns around, becomes RGB."""
    image = (pixels / PIXEL_MAX).clamp(0, 1).cpu()
    if len(image) != 3:
        return image.mean(0).numpy()
    return (image.flip(0) if flip else image).permute(1, 2, 0).numpy()


def _label(classes: Sequence[str] | None, index: int) -> str:
    name = str(index) if classes is None else str(classes[index])
    return name if len(name) <= 14 else f"{name[:13]}\N{HORIZONTAL ELLIPSIS}"


def _test_split(config: Config) -> str:
    split = next((split for split in ("test", "val") if config.get(f"{split}_dataloader")), None)
    if split is None:
        raise Refused(f"config: {config.filename} has no test_dataloader or val_dataloader: nothing to attack")
    return split


def _names(configs: Sequence[Config], paths: Sequence[str | Path], names: Sequence[str] | None) -> list[str]:
    if not configs:
        raise ValueError("checkpoints: expected at least one pair of config and checkpoint, got none")
    if names is None:
        names = [Path(config.filename or "config").stem for config in configs]
        if len(set(names)) < len(names):
            names = [f"{name} ({Path(path).stem})" for name, path in zip(names, paths, strict=True)]
    files = {_file_name(name) for name in names}
    if len(names) != len(configs) or len(files) < len(names):
        raise ValueError(f"names: expected {len(configs)} different names, got {', '.join(map(repr, names))}")
    return list(names)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
