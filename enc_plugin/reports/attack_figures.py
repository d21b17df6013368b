"""Figures of attacks: accuracy against eps, and images before and after the attack."""

from __future__ import annotations

from ..installation import needs_mmpretrain  # noqa: F401

# isort: split
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..functional import fgsm
from ..measuring.intervals import wilson_interval
from ..measuring.pipelines import WithoutReplacement
from ..measuring.pixels import PIXEL_MAX, PixelClassifier, collate_pixels
from ..measuring.robustness import Robustness
from ..measuring.spread import spread
from ..measuring.untouched import untouched
from . import plot

UNIT = "1/255 of the pixel range"
# Right and wrong predictions differ in mark, colour and lightness, for colour-blind readers.
_RIGHT, _WRONG = ("\N{CHECK MARK}", plot.PALETTE[0]), ("\N{BALLOT X}", plot.PALETTE[1])


def draw_accuracy(results: dict[str, Robustness], path: str | Path) -> None:
    """Draw accuracy against eps with 95 % Wilson bands, as a PNG.

    Each checkpoint has a colour; FGSM is a solid line, PGD a dashed one.
    """
    axes = plot.new_axes(f"L-inf budget eps ({UNIT})", "top-1 accuracy (%)")
    for i, (name, result) in enumerate(results.items()):
        solid = _points(f"{name}, FGSM", result, result.fgsm)
        plot.draw(axes, solid, i, linestyle="-", clip_on=False)
        if result.pgd:
            dashed = _points(f"{name}, PGD-{result.pgd_steps}", result, result.pgd)
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
    """Draw clean images, the same images under FGSM, and the amplified difference, with the predictions, as a PNG.

    The samples are spread evenly over the dataset; they are not chosen by the result. Those that cannot be read are
    left out.

    Args:
        model: Classifier of mmpretrain.
        dataset: Test set, as in :func:`enc_plugin.measuring.robustness.measure_robustness`.
        eps: Budget in 1/255 of the pixel range.
        path: File to write.
        count: Number of samples.
        name: Name of the model in the title.
    """
    classify, source = PixelClassifier(model), WithoutReplacement(dataset)
    device = next(model.parameters()).device
    classes = dict(getattr(dataset, "metainfo", None) or {}).get("classes")
    with untouched(classify):
        samples = [sample for i in spread(len(dataset), count) if (sample := source[i]) is not None]
        samples = samples or [next(sample for sample in map(source.__getitem__, range(len(source))) if sample)]
        alike = len({sample["inputs"].shape for sample in samples}) == 1
        batches = [samples] if alike else [[sample] for sample in samples]
        columns = [column for batch in batches for column in _columns(classify, batch, float(eps), device)]
    # Grey means no change, black and white the largest change that eps allows.
    rows = ("clean", f"FGSM, eps {eps:g}", f"difference x {PIXEL_MAX / 2 / eps:.3g}\n(grey: no change)")
    flip = bool(getattr(model.data_preprocessor, "to_rgb", False))
    figure = plot.new_figure((1.6 * len(columns) + 1.1, 6.0))
    grid = figure.subplots(3, len(columns), squeeze=False)
    for row, title in enumerate(rows):
        for column, (images, shares, label) in enumerate(columns):
            axes = grid[row][column]
            look = dict(cmap="gray", vmin=0, vmax=1, interpolation="nearest")  # cmap is used for one channel only
            axes.imshow(_to_image(images[row], flip), **look)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row < 2:
                share, predicted = (value.item() for value in shares[row].max(0))
                mark, color = _RIGHT if predicted == label else _WRONG
                axes.set_title(f"{mark} {_label(classes, predicted)} ({share:.0%})", color=color, fontsize=10)
            else:
                axes.set_xlabel(f"true: {_label(classes, label)}", fontsize=10)
        grid[row][0].set_ylabel(title, fontsize=11)
    figure.suptitle(f"{name}: prediction and its probability, clean and under attack (eps in {UNIT})", fontsize=11)
    plot.save(plot.to_png(figure, colors=None), path)


def _columns(
    classify: PixelClassifier, samples: Sequence[dict], eps: float, device: torch.device
) -> Iterator[tuple[list[Tensor], list[Tensor], int]]:
    """Of each sample: the clean image, the attacked one and their difference; probabilities of the first two; label."""
    pixels, labels = collate_pixels(samples)
    pixels, labels = pixels.to(device).float(), labels.to(device)
    attacked = fgsm(classify, pixels, labels, eps, upper=PIXEL_MAX)
    difference = (attacked - pixels) * (PIXEL_MAX / 2 / eps) + PIXEL_MAX / 2
    shares = [classify(x.clone()).softmax(1).cpu() for x in (pixels, attacked)]  # it may work in place
    for i, label in enumerate(labels.tolist()):
        yield [pixels[i], attacked[i], difference[i]], [share[i] for share in shares], label


def _points(name: str, result: Robustness, accuracies: dict[float, float]) -> plot.Series:
    eps = sorted(accuracies)
    y = [result.clean, *(accuracies[e] for e in eps)]
    return plot.Series(name, [0.0, *eps], y, *zip(*(wilson_interval(v, result.num_samples) for v in y), strict=True))


def _to_image(pixels: Tensor, flip: bool) -> np.ndarray:
    """Convert pixels ``(C, H, W)`` in 0..255 to an array for imshow; ``flip`` converts BGR to RGB."""
    image = (pixels / PIXEL_MAX).clamp(0, 1).cpu()
    if len(image) != 3:
        return image.mean(0).numpy()
    return (image.flip(0) if flip else image).permute(1, 2, 0).numpy()


def _label(classes: Sequence[str] | None, index: int) -> str:
    name = str(index) if classes is None else str(classes[index])
    return name if len(name) <= 14 else f"{name[:13]}\N{HORIZONTAL ELLIPSIS}"
