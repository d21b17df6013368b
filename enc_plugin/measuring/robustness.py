"""White-box robustness of an mmpretrain classifier, attacked in pixel space."""

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
from ..functional.jacobian import check_forward
from ..functional.precision import full_float32
from .pipelines import WithoutReplacement
from .pixels import PIXEL_MAX, PixelClassifier, PixelSpan, collate_pixels
from .ranks import joined, own_share
from .samples import in_batches
from .spread import one_of_each_section, spread
from .untouched import check_precision, untouched

ZERO_GRAD_LIMIT = 0.01  # share of samples with an all-zero gradient above which a warning is given
CHECKED_SAMPLES = 64
PGD_MARGIN = 10.0  # percentage points by which the accuracy under FGSM may exceed that under PGD without a warning


@dataclass(frozen=True)
class Robustness:
    """Top-1 accuracies in percent, by eps in 1/255 of the pixel range."""

    num_samples: int
    clean: float
    fgsm: dict[float, float]
    pgd: dict[float, float]
    pgd_steps: int
    zero_grad: float  # share of the samples with an all-zero gradient
    seconds: float
    left_out: int = 0  # samples that could not be read; not in num_samples

    @property
    def warnings(self) -> list[str]:
        """Reasons why the accuracies may not measure robustness, each with its usual cause."""
        found = [f"eps: {other_unit(eps)}" for eps in self.fgsm if eps < LEAST_EPS][:1]
        if self.left_out:
            found.append(
                f"{self.left_out} of {self.left_out + self.num_samples} samples cannot be read and are left out (the "
                "dataset would replace them by random ones)"
            )
        if self.clean == 0:
            found.append(
                "clean accuracy is 0 %: the labels, the channel order or mean and std do not fit the checkpoint, or "
                "the checkpoint was not loaded; attacks on such a model are meaningless"
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
                f"{self.zero_grad:.1%} of the samples have an all-zero gradient, so the attack does not change them "
                "(masked gradients): this accuracy overestimates the robustness"
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
    """Measure the top-1 accuracy of ``model`` on clean images, under FGSM and optionally under PGD.

    The attack is untargeted and uses the true labels. It changes pixels before the ``data_preprocessor`` normalises
    them and keeps them within 0..255; adversarial pixels are not rounded to integers. It has no side effects on a run.

    In a distributed run all ranks must call it. Whole batches are divided among the ranks, because the rounding of a
    result can depend on the batch size. So the result is bit-for-bit the same for any number of ranks.

    Args:
        model: Classifier of mmpretrain, not wrapped.
        dataset: Returns ``dict(inputs=..., data_samples=...)`` as ``PackInputs`` does: pixels ``(C, H, W)`` in
            0..255, and a ``gt_label``. Samples that cannot be read are left out and not replaced.
        eps: Attack budgets in 1/255 of the pixel range, above 0 and up to 255.
        num_samples: Number of samples, one of each section of the dataset; None: all.
        batch_size: Samples per batch.
        num_workers: Number of data loading processes.
        pgd_steps: Number of PGD steps for each eps (:func:`enc_plugin.functional.pgd`, random start); 0: only FGSM.
        seed: Seed of PGD's random starts.
        progress: Called after each batch with the number of finished batches and of all batches of this rank.

    Returns:
        The accuracies, equal on all ranks.

    Raises:
        ValueError: If the pixels are not in 0..255, images differ in size within a batch, there are no samples, the
            output is random or depends on other samples of the batch, or a weight is in half precision.
    """
    start = time.perf_counter()
    eps = check_pixel_eps(eps)
    check_integer("num_workers", num_workers, 0)
    check_integer("pgd_steps", pgd_steps, 0, below=MAX_STEPS)
    check_seed("seed", seed)
    check_precision(model)
    indices = one_of_each_section(len(dataset), num_samples)
    batches = in_batches(indices, batch_size)
    own = own_share(len(batches))
    loader = DataLoader(
        WithoutReplacement(dataset),
        batch_sampler=[batches[i] for i in own],
        num_workers=num_workers,
        collate_fn=collate_pixels,
        generator=torch.Generator(),  # otherwise the loader would use the global random state
    )
    classify = PixelClassifier(model)
    device = next(model.parameters()).device

    # One column per sample: whether it was read, label, zero gradient, clean prediction, prediction for each attack.
    # Each rank fills its columns; the others stay 0 until the reduction.
    attacks = len(eps) * (2 if pgd_steps else 1)
    table = torch.zeros(4 + attacks, len(indices), dtype=torch.int64, device="cpu")
    spans = []
    with untouched(classify), full_float32():
        for done, (i, (pixels, labels)) in enumerate(zip(own, loader, strict=True), 1):
            if len(labels):
                spans.append(PixelSpan.of(pixels))
                pixels, labels = pixels.to(device).float(), labels.to(device)
                if len(spans) == 1:
                    check_forward(classify, pixels)
                # One seed for each batch, so that the random starts do not depend on the number of ranks.
                start_seed = int(seed) * len(batches) + i
                rows = _attack(classify, pixels, labels, eps, pgd_steps, start_seed)
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


def _attack(
    classify: PixelClassifier, pixels: Tensor, labels: Tensor, eps: Sequence[float], pgd_steps: int, seed: int
) -> Tensor:
    """The columns of the table in :func:`measure_robustness` for a batch."""
    gradient, logits = input_gradient(classify, pixels, labels)
    adversarial = [sign_step(pixels, gradient, e, lower=0.0, upper=PIXEL_MAX) for e in eps]
    for e in eps if pgd_steps else ():
        generator = torch.Generator(pixels.device).manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "eps: .*half a grey level")  # Robustness.warnings has it
            found = pgd(classify, pixels, labels, e, steps=pgd_steps, generator=generator, upper=PIXEL_MAX)
        adversarial.append(found)
    read = torch.ones_like(labels)
    rows = [read, labels, ~_nonzero(gradient), logits.argmax(1), *(classify(x).argmax(1) for x in adversarial)]
    return torch.stack([row.long() for row in rows])


def check_pixel_eps(eps: float | Sequence[float]) -> list[float]:
    """Return ``eps`` as a list; raise unless it contains different numbers above 0 and up to 255."""
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
    """Raise ``ValueError`` if samples of ``dataset`` cannot be attacked.

    Up to 64 samples, spread over the dataset, are checked. One is not enough, because a black image has no range.
    """
    chosen = one_of_each_section(len(dataset), num_samples)
    looked_at = [chosen[i] for i in spread(len(chosen), CHECKED_SAMPLES)]
    source = WithoutReplacement(dataset)
    spans = [PixelSpan.of(collate_pixels([source[index]])[0]) for index in looked_at]
    PixelSpan.join(spans).check()


def _nonzero(gradient: Tensor) -> Tensor:
    """Whether each sample's gradient has a nonzero element, ``(N,)``; NaN counts as zero."""
    return (gradient.nan_to_num(nan=0.0) != 0).flatten(1).any(1)


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent, as mmpretrain's metric computes it."""
    from mmpretrain.evaluation import Accuracy  # not at the top, because hooks are imported without mmpretrain

    return Accuracy.calculate(predicted, labels).item()
