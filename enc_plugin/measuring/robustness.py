"""White-box robustness of an mmpretrain classifier, attacked in pixel units."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..functional.attack import LEAST_EPS, MAX_STEPS, input_gradient, other_unit, pgd, sign_step
from ..functional.checks import check_integer, check_number, check_seed
from ..functional.precision import full_float32
from .pipelines import WithoutReplacement
from .pixels import PIXEL_MAX, PixelClassifier, PixelSpan, collate_pixels
from .ranks import joined, own_share
from .samples import in_batches
from .spread import spread
from .untouched import untouched

ZERO_GRAD_LIMIT = 0.01  # share of samples without any gradient above which the attack says little
CHECKED_SAMPLES = 64
PGD_MARGIN = 10.0  # percentage points that FGSM may leave above PGD


@dataclass(frozen=True)
class Robustness:
    """Top-1 accuracies in percent, per eps in 1/255 of the pixel range."""

    num_samples: int
    clean: float
    fgsm: dict[float, float]
    pgd: dict[float, float]
    pgd_steps: int
    zero_grad: float  # share of the samples whose gradient is zero at every pixel
    seconds: float
    left_out: int = 0  # samples that could not be read, beside num_samples

    @property
    def warnings(self) -> list[str]:
        """Reasons why the accuracies may not show robustness, each with its usual cause."""
        found = [f"eps: {other_unit(eps)}" for eps in self.fgsm if eps < LEAST_EPS][:1]
        if self.left_out:
            found.append(
                f"{self.left_out} of {self.left_out + self.num_samples} samples cannot be read and are left out (the "
                "dataset would take others by chance)"
            )
        if self.clean == 0:
            found.append(
                "clean accuracy is 0 %: the labels, the channel order or mean and std do not fit the checkpoint, or "
                "it was not loaded; no attack says anything about such a model"
            )
        for attack, accuracies in (("FGSM", self.fgsm), (f"PGD-{self.pgd_steps}", self.pgd)):
            above = {eps: accuracy for eps, accuracy in accuracies.items() if accuracy > self.clean}
            if above:
                eps, accuracy = max(above.items(), key=lambda item: item[1])
                found.append(
                    f"{attack} at eps {eps:g} raises the accuracy from {self.clean:.2f} to {accuracy:.2f} %: the "
                    "gradient does not point to a larger loss (labels that do not fit, or masked gradients)"
                )
        if self.zero_grad > ZERO_GRAD_LIMIT:
            found.append(
                f"{self.zero_grad:.1%} of the samples have an all-zero gradient, so the attack leaves them as they are "
                "(saturated softmax or masked gradients): this accuracy overestimates the robustness"
            )
        both = [eps for eps in self.fgsm if eps in self.pgd]
        if both and self.fgsm[max(both)] - self.pgd[max(both)] > PGD_MARGIN:
            eps = max(both)
            found.append(
                f"at eps {eps:g} PGD-{self.pgd_steps} leaves {self.pgd[eps]:.2f} % and FGSM {self.fgsm[eps]:.2f} %: "
                "FGSM overestimates this model's robustness (its loss is not close to linear around the image); report "
                "PGD instead"
            )
        return found


def measure_robustness(
    model: nn.Module,
    dataset: Dataset,
    eps: Sequence[float],
    *,
    num_samples: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    pgd_steps: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Robustness:
    """Top-1 accuracy of ``model`` clean, under FGSM and, if asked for, under PGD, attacked in pixel space.

    The attack is untargeted and uses the true labels. It moves pixels before the ``data_preprocessor`` normalises them,
    and keeps them within 0..255; adversarial pixels are not rounded to integers. A run around it does not notice it.

    In a distributed run every rank has to call it. The ranks share out whole batches, because arithmetic can depend on
    the shape of a batch: so any number of ranks gives the same result to the last bit.

    Args:
        model: Classifier of mmpretrain, not wrapped.
        dataset: Yields ``dict(inputs=..., data_samples=...)`` as ``PackInputs`` makes it: pixels ``(C, H, W)`` in
            0..255, and a ``gt_label``. Samples that it cannot read, and would replace by others, are left out.
        eps: Budgets in 1/255 of the pixel range, above 0 and up to 255.
        num_samples: How many samples, spread evenly over the dataset; None: all.
        batch_size: Samples per batch.
        num_workers: Number of processes that load.
        pgd_steps: Steps of PGD for each eps (:func:`enc_plugin.functional.pgd`, random start); 0: FGSM alone.
        seed: Seed of PGD's random starts.
        progress: Called after each batch with the number of batches that this rank has done, and of all its batches.

    Returns:
        The accuracies, equal on all ranks.

    Raises:
        ValueError: If the pixels are not in 0..255, images differ in size within a batch, or there are no samples.
    """
    start = time.perf_counter()
    eps = check_pixel_eps(eps)
    check_integer("num_workers", num_workers, 0)
    check_integer("pgd_steps", pgd_steps, 0, below=MAX_STEPS)
    check_seed("seed", seed)
    indices = spread(len(dataset), num_samples)
    batches = in_batches(indices, batch_size)
    own = own_share(len(batches))
    loader = DataLoader(
        WithoutReplacement(dataset),
        batch_sampler=[batches[i] for i in own],
        num_workers=num_workers,
        collate_fn=collate_pixels,
        generator=torch.Generator(),  # else the loader would draw from the global one
    )
    classify = PixelClassifier(model)
    device = next(model.parameters()).device

    # Rows: whether it was read, label, zero gradient, clean prediction, prediction per attack. Each rank fills its
    # columns, others stay 0.
    attacks = len(eps) * (2 if pgd_steps else 1)
    table = torch.zeros(4 + attacks, len(indices), dtype=torch.int64)
    spans = []

    def attack(pixels: Tensor, labels: Tensor, number: int) -> Tensor:
        gradient, logits = input_gradient(classify, pixels, labels)
        adversarial = [sign_step(pixels, gradient, e, lower=0.0, upper=PIXEL_MAX) for e in eps]
        if pgd_steps:
            # Seeded by the batch and not carried on, so that the ranks draw what a single process would.
            for e in eps:
                generator = torch.Generator(device).manual_seed(int(seed) * len(batches) + number)
                options = dict(steps=pgd_steps, generator=generator, upper=PIXEL_MAX)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "eps: .*half a grey level")  # it is among the result's warnings
                    adversarial.append(pgd(classify, pixels, labels, e, **options))
        read = torch.ones_like(labels)
        rows = [read, labels, ~_nonzero(gradient), logits.argmax(1), *(classify(x).argmax(1) for x in adversarial)]
        return torch.stack([row.long() for row in rows])

    with untouched(classify), full_float32():
        for done, (i, (pixels, labels)) in enumerate(zip(own, loader, strict=True), 1):
            if len(labels):
                spans.append(PixelSpan.of(pixels))
                rows = attack(pixels.to(device).float(), labels.to(device), i)
                table[:, i * batch_size : i * batch_size + len(labels)] = rows.cpu()
            if progress is not None:
                progress(done, len(own))
    all_reduce(table)
    PixelSpan.join(joined(spans)).check()

    table = table[1:, table[0] == 1]
    if not table.shape[1]:
        raise ValueError(f"dataset: none of the {len(indices)} chosen samples can be read")
    labels, zero, clean, *attacked = table
    accuracies = [_accuracy(predicted, labels) for predicted in attacked]
    return Robustness(
        num_samples=len(labels),
        clean=_accuracy(clean, labels),
        fgsm=dict(zip(eps, accuracies, strict=False)),
        pgd=dict(zip(eps, accuracies[len(eps) :], strict=False)),
        pgd_steps=pgd_steps,
        zero_grad=zero.double().mean().item(),
        seconds=time.perf_counter() - start,
        left_out=len(indices) - len(labels),
    )


def check_pixel_eps(eps: float | Sequence[float]) -> list[float]:
    """``eps`` as a list; an error unless it holds different numbers above 0 and up to 255."""
    expected = "different numbers above 0, in 1/255 of the pixel range"
    if isinstance(eps, (str, bytes)) or not isinstance(eps, (Real, Sequence)):
        raise TypeError(f"eps: expected {expected}, got {eps!r}")
    values = [eps] if isinstance(eps, Real) else list(eps)
    for value in values:
        check_number("eps", value, expected, lambda number: True)
    if not values or len(set(values)) < len(values) or not all(0 < value <= PIXEL_MAX for value in values):
        raise ValueError(f"eps: expected {expected} (at most 255), got {eps!r}")
    return values


def check_dataset(dataset: Dataset, num_samples: int | None) -> None:
    """Raise ``ValueError`` if samples show that they cannot be attacked: at most 64, spread over the dataset.

    One picture is not enough, because a black one does not show the range.
    """
    chosen = spread(len(dataset), num_samples)
    looked_at = [chosen[i] for i in spread(len(chosen), CHECKED_SAMPLES)]
    source = WithoutReplacement(dataset)
    spans = [PixelSpan.of(collate_pixels([source[index]])[0]) for index in looked_at]
    PixelSpan.join(spans).check()


def _nonzero(gradient: Tensor) -> Tensor:
    """Whether each sample's gradient moves any pixel, ``(N,)``; NaN moves none."""
    return (gradient.nan_to_num(nan=0.0) != 0).flatten(1).any(1)


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent, as mmpretrain's metric computes it."""
    from mmpretrain.evaluation import Accuracy  # here: the hooks register with mmengine alone

    return Accuracy.calculate(predicted, labels).item()
