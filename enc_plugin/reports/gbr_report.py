"""GBR of checkpoints as table, JSON and figure: the implementation of ``tools/measure_gbr.py``."""

from __future__ import annotations

from ..installation import needs_mmpretrain  # noqa: F401

# isort: split
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..build import build_dataset, load_config, load_model, pick_device
from ..checkpoint_files import file_sha256
from ..measuring.gbr import SPACES, GBREstimate, check_options, input_unit, measure_gbr, pick_batch_size
from ..measuring.pipelines import find_pipeline
from ..measuring.samples import FixedSamples, choose_samples
from ..refused import require_file
from ..table import format_table
from ..version import __version__
from . import plot
from .runs import default_names

NAMES = {"logits": "logits", "probs": "probabilities", "label_prob": "probability of the true class"}


@dataclass(frozen=True)
class GBRReport:
    """Results of a measurement; ``print`` shows them as a table.

    Attributes:
        records: One for each checkpoint and output: ``config``, ``checkpoint``, ``epoch`` (None if unknown),
            ``weights`` (``'averaged'`` by EMAHook, ``'in training'`` or ``'unknown'``), ``output``, ``samples`` (their
            number), ``left_out`` (samples that could not be read), ``gbr`` (the mean over the samples), ``sem`` (its
            standard error), ``low`` and ``high`` (its 95 % bootstrap interval), ``median`` (None if estimated with
            random directions), ``unit`` and ``seconds``.
        settings: The settings that the records depend on, and each checkpoint's SHA-256 and origin; ready for JSON.
            ``num_samples`` is None if the datasets of several configs gave different numbers.
    """

    records: list[dict]
    settings: dict

    def __str__(self) -> str:
        paths = list(dict.fromkeys(r["checkpoint"] for r in self.records))
        names = dict(zip(paths, default_names(paths), strict=True))
        rows = [
            (
                names[r["checkpoint"]],
                "-" if r["epoch"] is None else f"{r['epoch']}",
                r["weights"],
                r["output"],
                f"{r['gbr']:.6g}",
                f"{r['low']:.4g} to {r['high']:.4g}",
                "-" if r["median"] is None else f"{r['median']:.4g}",
                f"{r['seconds']:.1f}",
            )
            for r in self.records
        ]
        head = ("checkpoint", "epoch", "weights", "output", "GBR", "95 % interval", "median", "seconds")
        space = self.settings["space"]
        units, counts = (dict.fromkeys(str(r[key]) for r in self.records) for key in ("unit", "samples"))
        return (
            f"GBR: mean squared Jacobian norm over {' or '.join(counts)} training samples, "
            f"{' or '.join(units)} (space {space!r}: {SPACES[space]}); bootstrap interval of the mean\n"
            f"{format_table(head, rows)}"
        )


def measure_checkpoints(
    checkpoints: Sequence[tuple[str | Path | Config, str | Path]],
    *,
    outputs: Sequence[str] = ("logits",),
    num_samples: int | None = 512,
    batch_size: int | None = None,
    projections: int | None = None,
    space: str = "normalized",
    seed: int = 0,
    device: str | None = None,
    out: str | Path | None = None,
    plot: str | Path | None = None,
    progress: bool = False,
) -> GBRReport:
    """Measure the GBR of checkpoints on the training samples that :class:`enc_plugin.engine.GBRHook` would choose.

    Args:
        checkpoints: Pairs of a training config and a checkpoint. The config gives the model, the training dataset, and
            the pipeline of validation (or test). Pairs with the same config must follow each other.
        outputs: Any of ``'logits'``, ``'probs'``, ``'label_prob'``.
        num_samples: Number of training samples; None: all.
        batch_size: Samples per forward pass; None: as :class:`enc_plugin.engine.GBRHook` does.
        projections: Number of random orthonormal output directions for each sample; None: exact.
        space: ``'normalized'`` or ``'pixel'``, see :class:`enc_plugin.engine.GBRHook`.
        seed: Seed of the choice of samples and of the directions.
        device: Device, such as ``'cpu'`` or ``'cuda:1'``; None: a GPU if there is one.
        out: JSON file to write, with the settings and the records.
        plot: PNG file for the curve over the checkpoints. None: ``out`` with the ending ``.png`` if there are several
            checkpoints, else none.
        progress: Show a progress bar on the terminal (standard error).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If an option is out of range, a config has no test pipeline, a checkpoint does not fit its config,
            or the pixels are not in 0..255 (``space='pixel'``).
    """
    for output in outputs:
        check_options(output, projections, space, num_samples)
    device = pick_device(device)
    configs = [load_config(config) for config, _ in checkpoints]
    for _, path in checkpoints:
        require_file("checkpoint", path)

    records, measured, samples = [], [], None
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, disable=not progress, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("samples", total=None)
        for before, config, (_, path) in zip([None, *configs], configs, checkpoints, strict=False):
            if before is None or before.to_dict() != config.to_dict():
                size = batch_size or pick_batch_size(device, (config.get("train_dataloader") or {}).get("batch_size"))
                samples = _samples(config, num_samples, size, seed, space)
                bar.update(task, total=len(samples) * len(checkpoints) * len(outputs))
            # A new model for each checkpoint, so that no state of another checkpoint is left.
            model, meta = load_model(config, path)
            model.to(device)
            measured.append({"checkpoint": str(path), "sha256": file_sha256(path), "meta": meta})
            for output in outputs:
                found = measure_gbr(
                    model,
                    samples,
                    output=output,
                    projections=projections,
                    space=space,
                    seed=seed,
                    progress=lambda count: bar.advance(task, count),
                )
                origin = {"config": config.filename, "checkpoint": str(path), "epoch": meta.get("epoch")}
                origin |= {"weights": meta["weights"], "output": output}
                origin |= {"samples": len(samples), "left_out": samples.left_out}
                records.append(origin | _results(found) | {"unit": input_unit(model, space), "seconds": found.seconds})
    settings = {
        "num_samples": len(samples) if len({record["samples"] for record in records}) == 1 else None,
        "projections": projections,
        "space": space,
        "seed": seed,
        "enc_plugin": __version__,
        "torch": str(torch.__version__),
        "checkpoints": measured,
    }
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps({**settings, "results": records}, indent=1) + "\n")
        if plot is None and len(checkpoints) > 1:
            plot = Path(out).with_suffix(".png")
    if plot is not None:
        draw_gbr(records, plot)
    return GBRReport(records, settings)


def _results(found: GBREstimate) -> dict[str, float | None]:
    low, high = found.interval
    return {"gbr": found.mean, "sem": found.sem, "low": low, "high": high, "median": found.median}


def draw_gbr(records: Sequence[dict], path: str | Path) -> None:
    """Draw the records over their epochs with bootstrap intervals, as a PNG."""
    unit = " or ".join(dict.fromkeys(r["unit"] for r in records))
    ylabel = f"GBR = mean $\\Vert\\partial f/\\partial x\\Vert_F^2$\n({unit})"
    plot.save(plot.curves(lines(records), "epoch", ylabel, logy=True, whole_x=True), path)


def lines(records: Sequence[dict]) -> list[plot.Series]:
    """A line over the epochs for each config, folder of checkpoints and output."""

    def run_of(record: dict) -> tuple[str | None, Path]:
        return record["config"], Path(record["checkpoint"]).parent

    runs = list(dict.fromkeys(map(run_of, records)))
    names = [Path(config or "config").stem for config, _ in runs]
    if len(set(names)) < len(names):
        names = default_names([folder for _, folder in runs])
    series = []
    for run, run_name in zip(runs, names, strict=True):
        for output in dict.fromkeys(r["output"] for r in records):
            chosen = [r for r in records if (run_of(r), r["output"]) == (run, output)]
            if all(r["epoch"] is not None for r in chosen):
                chosen.sort(key=lambda r: r["epoch"])
            x = [r["epoch"] if r["epoch"] is not None else i for i, r in enumerate(chosen, 1)]
            y, low, high = ([r[key] for r in chosen] for key in ("gbr", "low", "high"))
            name = NAMES[output] if len(runs) == 1 else f"{run_name}, {NAMES[output]}"
            series.append(plot.Series(name, x, y, low, high))
    return series


def _samples(config: Config, num_samples: int | None, batch_size: int, seed: int, space: str) -> FixedSamples:
    """Training samples of a config, read with its validation or test pipeline."""
    datasets = ((config.get(f"{split}_dataloader") or {}).get("dataset") for split in ("val", "test"))
    pipeline = next((p for dataset in datasets if (p := find_pipeline(dataset)) is not None), None)
    if pipeline is None:
        raise ValueError("config: neither val_dataloader nor test_dataloader has a pipeline to read the samples with")
    dataset = build_dataset(config, "train")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        samples = FixedSamples(dataset, pipeline, choose_samples(dataset, num_samples, seed), batch_size)
        if space == "pixel":
            samples.check_pixels()
    return samples
