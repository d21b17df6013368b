"""GBR of an mmpretrain classifier on fixed samples (eq. 18)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from mmengine.dist import all_reduce
from mmengine.model import BaseModel
from torch import Tensor

from ..functional.checks import check_integer, check_seed
from ..functional.jacobian import check_forward, check_output, check_projections, squared_norms
from ..functional.precision import full_float32
from .intervals import bootstrap_interval
from .pixels import logits_of, preprocess
from .samples import FixedSamples
from .untouched import check_precision, untouched

SPACES = {
    "normalized": "the network's input, after the data_preprocessor",
    "pixel": "pixels in 0..255, before the data_preprocessor",
}

BATCH_SIZE = 32  # larger batches are not faster on a CPU


@dataclass(frozen=True)
class GBREstimate:
    r"""Values of :math:`\lVert \partial f(x) / \partial x \rVert_F^2` for each sample, and their statistics.

    The unit is squared logits or probabilities per squared unit of x. The unit of x is one standard deviation of the
    ``data_preprocessor`` (``space='normalized'``) or 1/255 of the pixel range (``'pixel'``).
    """

    values: Tensor  # (N,) float64, in the order of the samples
    seconds: float
    exact: bool = True  # False: each value is an estimate from random directions

    @property
    def mean(self) -> float:
        """The GBR; NaN or infinite if any sample's value is."""
        return self.values.mean().item()

    @property
    def sem(self) -> float:
        """Standard error of the mean, over samples and random directions (each sample has its own directions)."""
        return (self.values.std() / math.sqrt(len(self.values))).item()

    @property
    def median(self) -> float | None:
        """Median over the samples, which is robust against a heavy tail; NaN if any value is.

        None for estimates: their mean is unbiased, but their noise is skewed and lowers the median, down to less than
        half with one direction.
        """
        return self.values.quantile(0.5).item() if self.exact else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the mean, over samples and random directions."""
        return bootstrap_interval(self.values)

    @property
    def num_bad(self) -> int:
        """Number of samples whose value is NaN or infinite."""
        return int((~self.values.isfinite()).sum())


def measure_gbr(
    model: BaseModel,
    samples: FixedSamples,
    *,
    output: str = "logits",
    projections: int | None = None,
    space: str = "normalized",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> GBREstimate:
    """Measure the squared Jacobian norms of ``model`` in eval mode and float32, without side effects on a run.

    In a distributed run all ranks must call it. The batches are divided among the ranks, and the result does not depend
    on the number of ranks. With the same seed, a sample gets the same random directions in each measurement, so
    differences between two measurements come from the network.

    Args:
        model: Classifier of mmpretrain, not wrapped.
        samples: The samples to measure on.
        output: ``'logits'``, ``'probs'`` or ``'label_prob'``, see :func:`enc_plugin.functional.gbr`.
        projections: Number of random orthonormal output directions for each sample; None: exact.
        space: What x is: ``'normalized'`` (the network's input) or ``'pixel'`` (0..255, before normalisation).
        seed: Seed of the directions.
        progress: Called with the number of samples after each batch of this rank.

    Returns:
        The estimate, equal on all ranks.

    Raises:
        ValueError: If ``space`` is unknown, ``output`` needs probabilities and the head does not predict any, or a
            weight is in half precision.
    """
    check_space(space)
    check_seed("seed", seed)
    check_precision(model)
    start = time.perf_counter()
    device = next(model.parameters()).device
    seeds = torch.randint(2**32, (len(samples),), generator=torch.Generator().manual_seed(int(seed)), device="cpu")
    positions = torch.arange(len(samples), device="cpu").split([len(batch) for batch in samples.batches])
    values = torch.zeros(len(samples), dtype=torch.float64, device="cpu")
    with untouched(model), full_float32():
        forward = None
        for number in samples.own:
            pixels, labels = samples.batch(number)
            if not len(pixels):
                continue
            x = pixels.to(device).float()
            if space == "normalized":
                x = preprocess(model, x)
            if output == "label_prob" and labels is None:
                raise ValueError("dataset: 'label_prob' needs one gt_label for each sample")
            labels = None if labels is None else labels.to(device)
            if forward is None:
                forward, differentiated = _function(model, output, space, x)
                check_forward(forward, x, differentiated, labels)
            where = positions[number]
            found = _as_memory_allows(forward, x, differentiated, labels, projections, seeds[where])
            values[where] = found.double().cpu()
            if progress is not None:
                progress(len(x))
    all_reduce(values)
    return GBREstimate(values, time.perf_counter() - start, projections is None or output == "label_prob")


def pick_batch_size(device: torch.device, trained_with: int | None) -> int:
    """Batch size of a measurement: 32, or on a GPU the batch size of training if that is larger.

    A measurement needs no more memory than a training step with the same batch size, because it has no gradients of
    weights. If the memory is still too small (after training in half precision), batches are split.

    Args:
        device: Device of the model.
        trained_with: Batch size of the training data loader; None: unknown.
    """
    return BATCH_SIZE if device.type == "cpu" else max(BATCH_SIZE, trained_with or 0)


def _as_memory_allows(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    output: str,
    labels: Tensor | None,
    projections: int | None,
    seeds: Tensor,
) -> Tensor:
    """:func:`squared_norms` of a batch, which is halved as long as the device has too little memory."""
    try:
        return squared_norms(forward, x, output, labels, projections, seeds)
    except torch.OutOfMemoryError:
        if len(x) == 1:
            raise
    half = len(x) // 2  # outside of the except block, where the exception would keep the tensors alive
    parts = [
        _as_memory_allows(forward, x[part], output, None if labels is None else labels[part], projections, seeds[part])
        for part in (slice(half), slice(half, None))
    ]
    return torch.cat(parts)


def input_unit(model: BaseModel, space: str) -> str:
    """The unit of x in words, which depends on whether the model normalises its input."""
    if space == "pixel":
        return "per squared gray level, 1/255 of the pixel range"
    if getattr(model.data_preprocessor, "_enable_normalize", True):
        return "per squared standard deviation of the input"
    return "per squared unit of the network's input, which the data_preprocessor does not normalise"


def _function(model: BaseModel, output: str, space: str, x: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    """The arguments ``forward`` and ``output`` of :func:`enc_plugin.functional.gbr` to measure ``output``.

    Probabilities are the scores that the head predicts. They need not be the softmax of the logits.
    """

    def processed(x: Tensor) -> Tensor:
        return preprocess(model, x) if space == "pixel" else x

    def logits(x: Tensor) -> Tensor:
        return logits_of(model, processed(x))

    def scores(x: Tensor) -> Tensor:
        return torch.stack([sample.pred_score for sample in model(processed(x), mode="predict")])

    if output == "logits":
        return logits, "logits"
    head = type(getattr(model, "head", model)).__name__
    try:
        predicted = scores(x.clone())  # some networks start with an in-place operation
    except (AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"output: {output!r} needs a head that predicts scores for each image, but {head} does not "
            f"({type(error).__name__}: {error}); measure 'logits'"
        ) from error
    given = model(processed(x.clone()), mode="tensor")
    is_alike = isinstance(given, Tensor) and given.shape == predicted.shape
    if is_alike and torch.allclose(given.softmax(1), predicted, rtol=1e-4, atol=1e-6, equal_nan=True):
        return logits, output
    if output == "label_prob":
        raise ValueError(
            f"output: 'label_prob' is the softmax of the true class, but the scores of {head} are not the softmax of "
            "its logits; measure 'probs' (the scores that it predicts) or 'logits'"
        )
    return scores, "logits"


def check_options(output: str, projections: int | None, space: str, num_samples: int | None) -> None:
    """Raise ``ValueError`` if an option of a measurement is not valid."""
    check_output(output)
    check_projections(projections)
    check_space(space)
    check_integer("num_samples", num_samples, 2, none="all")  # a standard error needs two


def check_space(space: str) -> None:
    """Raise ``ValueError`` unless ``space`` is one of ``SPACES``."""
    if not isinstance(space, str) or space not in SPACES:
        raise ValueError(f"space: expected one of {', '.join(map(repr, SPACES))}, got {space!r}")
