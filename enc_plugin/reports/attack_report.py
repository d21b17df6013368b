"""Accuracy of trained checkpoints under attack: the implementation of ``tools/attack.py``."""

from __future__ import annotations

from ..installation import needs_mmpretrain  # noqa: F401

# isort: split
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import Progress

from ..build import build_dataset, evaluation_split, load_config, load_model, pick_device
from ..checkpoint_files import file_sha256
from ..functional.checks import check_integer
from ..measuring.intervals import wilson_interval
from ..measuring.robustness import Robustness, check_pixel_eps, measure_robustness
from ..refused import require_file
from ..table import format_table
from ..version import __version__
from .attack_figures import UNIT, draw_accuracy, draw_pictures


@dataclass(frozen=True)
class Attacked:
    """One checkpoint and its result."""

    name: str
    config: str
    checkpoint: str
    sha256: str
    meta: dict
    result: Robustness


@dataclass(frozen=True)
class AttackReport:
    """Results of several checkpoints; ``print`` shows them as a table with warnings.

    Attributes:
        runs: One result for each checkpoint, in the given order.
        eps: Budgets in 1/255 of the pixel range.
        seed: Seed of PGD's random starts.
        files: The files that were written.
    """

    runs: list[Attacked]
    eps: list[float]
    seed: int
    files: list[Path] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """Reasons why the accuracies may not measure robustness, each with the checkpoint's name."""
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
        widest = wilson_interval(50, first.num_samples)[1] - 50
        return "\n".join(
            [
                f"Top-1 accuracy (%) of {first.num_samples} test samples, clean and under attack in pixel space; eps "
                f"in {UNIT}; 95 % intervals (Wilson; in attack.json) of at most \N{PLUS-MINUS SIGN}{widest:.1f}",
                format_table(head, rows),
                *(f"WARNING: {warning}" for warning in self.warnings),
            ]
        )

    def to_dict(self) -> dict:
        """All results and the settings that they depend on, for JSON."""
        runs = [asdict(run) | {"warnings": run.result.warnings} for run in self.runs]
        for run in runs:
            result, count = run["result"], run["result"]["num_samples"]
            for attack in ("fgsm", "pgd"):
                result[attack] = {f"{eps:g}": accuracy for eps, accuracy in result[attack].items()}
            result["intervals"] = {"clean": wilson_interval(result["clean"], count)} | {
                attack: {eps: wilson_interval(accuracy, count) for eps, accuracy in result[attack].items()}
                for attack in ("fgsm", "pgd")
            }
        return {
            "unit": {
                "eps": UNIT,
                "accuracy": "top-1, percent; intervals: 95 %, Wilson",
                "zero_grad": "share of the samples",
            },
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
        checkpoints: Pairs of a config and a checkpoint (of mmengine, a state dict, or a ``.safetensors`` file).
        eps: Budgets in 1/255 of the pixel range.
        pgd_steps: Number of PGD steps for each eps; 0: only FGSM.
        names: Names in the table; None: the names of the configs, with the names of the checkpoints if they are equal.
        num_samples: Number of samples, always the same, spread over the test set; None: all.
        batch_size: Samples per batch; None: batch size of the test dataloader.
        num_workers: Number of data loading processes.
        pictures: Number of samples to draw for each checkpoint; 0: none.
        seed: Seed of PGD's random starts.
        device: Device, such as ``'cpu'`` or ``'cuda:1'``; None: a GPU if there is one.
        out: Folder for ``attack.json``, ``accuracy.png`` and ``pictures_<name>.png``; None: nothing is written.
        progress: Show a progress bar for each checkpoint on the terminal (standard error).

    Returns:
        The report.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a checkpoint does not fit its config, the test sets differ in length, names repeat, or an option
            is out of range.
    """
    eps = check_pixel_eps(eps)
    check_integer("pictures", pictures, 0)
    configs = [load_config(config) for config, _ in checkpoints]
    for _, checkpoint in checkpoints:
        require_file("checkpoint", checkpoint)
    names = _names(configs, [path for _, path in checkpoints], names)
    device = pick_device(device)
    splits = [evaluation_split(config) for config in configs]
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
