"""GBR of checkpoints: table, JSON and curve; the library behind ``tools/measure_gbr.py``."""

from __future__ import annotations

from ..installation import needs_mmpretrain  # noqa: F401

# isort: split
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..build import build_dataset, load_config, load_model, pick_device
from ..checkpoint import file_sha256
from ..measuring.gbr import check_options, input_unit, measure_gbr, pick_batch_size
from ..measuring.pipelines import find_pipeline
from ..measuring.samples import FixedSamples, choose_samples
from ..refused import require_file
from ..table import format_table
from ..version import __version__
from . import plot

NAMES = {"logits": "logits", "probs": "probabilities", "label_prob": "probability of the true class"}


def measure_checkpoints(
    config: str | Path | Config,
    checkpoints: Sequence[str | Path],
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
    show_progress: bool = True,
) -> list[dict]:
    """GBR of each checkpoint and output, on the training samples that :class:`enc_plugin.engine.GBRHook` would choose.

    Args:
        config: Training config: its model, its training dataset, and its validation (else test) pipeline.
        checkpoints: Checkpoints of that model.
        outputs: Any of ``'logits'``, ``'probs'``, ``'label_prob'``.
        num_samples: How many training samples; None: all.
        batch_size: Samples differentiated at a time; None: as :class:`enc_plugin.engine.GBRHook` does.
        projections: Random orthonormal output directions for each sample; None: exact.
        space: ``'normalized'`` or ``'pixel'``, see :class:`enc_plugin.engine.GBRHook`.
        seed: Of the choice of samples and of the directions.
        device: Such as ``'cpu'`` or ``'cuda:1'``; None: a GPU if there is one.
        out: JSON file to write: the settings, what each checkpoint is (SHA-256, its epoch, iteration, seed and
            experiment name) and one record for each checkpoint and output.
        plot: PNG to draw the curve over the checkpoints to; None: ``out`` with the ending ``.png`` if there are several
            checkpoints, else none.
        show_progress: Draw a progress bar to stderr.

    Returns:
        One ``dict(checkpoint, epoch, weights, output, gbr, sem, seconds)`` for each checkpoint and output; ``epoch`` is
        what the checkpoint says (None if nothing), ``weights`` which ones its state dict holds: ``'averaged'`` (by
        EMAHook), ``'in training'`` or ``'unknown'``.

    Raises:
        FileNotFoundError: If a checkpoint is missing.
        ValueError: If an option is out of range, the config has no test pipeline, a checkpoint does not fit it, or the
            pixels are not in 0..255 (``space='pixel'``).
    """
    for output in outputs:
        check_options(output, projections, space, num_samples)
    device = pick_device(device)
    cfg = load_config(config)
    for checkpoint in checkpoints:
        require_file("checkpoint", checkpoint)
    pipeline = next((p for key in ("val", "test") if (p := find_pipeline(_dataset(cfg, key))) is not None), None)
    if pipeline is None:
        raise ValueError("config: neither val_dataloader nor test_dataloader has a pipeline to read the samples with")
    dataset = build_dataset(cfg, "train")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        size = batch_size or pick_batch_size(device, cfg.train_dataloader.get("batch_size"))
        samples = FixedSamples(dataset, pipeline, choose_samples(dataset, num_samples, seed), size)
        samples.read()
        if space == "pixel":
            samples.check_pixels()

    records, measured, unit = [], [], ""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, disable=not show_progress, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("samples", total=len(samples) * len(checkpoints) * len(outputs))
        for checkpoint in checkpoints:
            # The model is built anew, so that nothing of one checkpoint stays in the next.
            model, meta = load_model(cfg, checkpoint)
            model.to(device)
            unit = input_unit(model, space)
            measured.append({"checkpoint": str(checkpoint), "sha256": file_sha256(checkpoint), "meta": meta})
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
                record = {"checkpoint": str(checkpoint), "epoch": meta.get("epoch"), "output": output}
                record["weights"] = meta["weights"]
                records.append(record | {"gbr": found.mean, "sem": found.sem, "seconds": found.seconds})
    settings = {
        "config": cfg.filename,
        "num_samples": len(samples),
        "left_out": samples.left_out,
        "projections": projections,
        "space": space,
        "unit": unit,
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
        plot_gbr({NAMES[output]: _curve(records, output) for output in outputs}, plot, unit=unit)
    return records


def describe(records: Sequence[dict]) -> str:
    """The records as a plain-text table."""
    rows = [
        (
            Path(r["checkpoint"]).name,
            "-" if r["epoch"] is None else f"{r['epoch']}",
            r["weights"],
            r["output"],
            f"{r['gbr']:.6g}",
            f"{r['sem']:.2g}",
            f"{r['seconds']:.1f}",
        )
        for r in records
    ]
    return format_table(("checkpoint", "epoch", "weights", "output", "GBR", "± (sem)", "seconds"), rows)


def plot_gbr(
    curves: dict[str, Sequence[tuple[float, float, float]]], path: str | Path, *, unit: str, step: str = "epoch"
) -> None:
    """Draw GBR against training time, with the standard error as a band, on a logarithmic axis.

    Args:
        curves: Points ``(step, gbr, sem)`` of each curve, by name.
        path: PNG to write; its folder is made.
        unit: What the axis names as the unit.
        step: What the steps are.
    """
    series = [plot.Series.with_error(name, *zip(*points, strict=True)) for name, points in curves.items()]
    ylabel = f"GBR = mean $\\Vert\\partial f/\\partial x\\Vert_F^2$\n({unit})"
    plot.save(plot.curves(series, step, ylabel, logy=True, whole_x=True), path)


def _dataset(cfg: Config, key: str) -> dict | None:
    return (cfg.get(f"{key}_dataloader") or {}).get("dataset")


def _curve(records: Sequence[dict], output: str) -> list[tuple[float, float, float]]:
    chosen = [r for r in records if r["output"] == output]
    known = all(r["epoch"] is not None for r in chosen)
    points = [(r["epoch"] if known else i, r["gbr"], r["sem"]) for i, r in enumerate(chosen, 1)]
    return sorted(points)
