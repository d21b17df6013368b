"""GBR of an mmpretrain classifier on fixed training samples (eq. 18)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from mmengine.dataset import Compose
from mmengine.dist import all_reduce, get_dist_info
from mmengine.model import BaseModel
from torch import Tensor
from torch.utils.data import Dataset

from ..functional._checks import check_integer, check_seed
from ..functional.jacobian import check_output, check_projections, gbr
from .measure import untouched
from .robustness import PixelClassifier

SPACES = {
    "normalized": "what the network receives, after the data_preprocessor",
    "pixel": "pixels in 0..255, before the data_preprocessor",
}


@dataclass(frozen=True)
class GBREstimate:
    r"""Mean of :math:`\lVert \partial f(x) / \partial x \rVert_F^2` over samples, and what it rests on.

    The unit is that of f squared over that of x squared: logits or probabilities over standard deviations of the
    ``data_preprocessor`` (``space='normalized'``) or over 1/255 of the pixel range (``'pixel'``).
    """

    values: Tensor  # (N,) float64, in the order of the samples
    seconds: float

    @property
    def mean(self) -> float:
        """The GBR; NaN or infinite if any sample's value is."""
        return self.values.mean().item()

    @property
    def sem(self) -> float:
        """Standard error of the mean, over samples and probes: each sample has its own, so one deviation has both."""
        return (self.values.std() / math.sqrt(len(self.values))).item()

    @property
    def num_bad(self) -> int:
        """Number of samples whose value is NaN or infinite."""
        return int((~self.values.isfinite()).sum())


class FixedSamples:
    """The same samples of a dataset under a pipeline that is not the dataset's own, in batches, read once.

    Each rank reads and keeps the batches that it will measure; batches are the same for any number of ranks.

    Args:
        dataset: Dataset of mmengine or mmpretrain, wrapped ones (repeated, concatenated, balanced, folds) too.
        pipeline: Transforms that end in ``PackInputs``, usually the test pipeline: configs or callables.
        indices: Which samples, in this order.
        batch_size: Samples per batch.

    Raises:
        TypeError: If the dataset cannot hand out a sample before its own pipeline.
    """

    def __init__(self, dataset: Dataset, pipeline: Sequence, indices: Sequence[int], batch_size: int):
        if not hasattr(dataset, "get_data_info"):
            raise TypeError(
                f"dataset: {type(dataset).__name__} has no get_data_info(index), which mmengine's datasets have, so "
                "that its samples cannot be read without augmentation; derive it from mmpretrain's BaseDataset"
            )
        check_integer("batch_size", batch_size, 1)
        self.dataset = dataset
        self.pipeline = Compose(list(pipeline))
        self.batches = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        self._read: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    @property
    def own(self) -> range:
        """Numbers of the batches that this rank measures."""
        rank, world_size = get_dist_info()
        return range(rank, len(self.batches), world_size)

    def read(self) -> FixedSamples:
        """Read this rank's batches now and not at the first measurement."""
        for number in self.own:
            self.batch(number)
        return self

    def batch(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Pixels ``(N, C, H, W)`` as the pipeline delivers them, and labels ``(N,)`` (None if there are none)."""
        if number not in self._read:
            packed = [self.pipeline(self.dataset.get_data_info(index)) for index in self.batches[number]]
            shapes = {tuple(sample["inputs"].shape) for sample in packed}
            if len(shapes) > 1:
                raise ValueError(
                    f"pipeline: expected images of one size, got {', '.join(map(str, sorted(shapes)))}; resize or crop "
                    "them in the test pipeline, or use batch_size=1"
                )
            labels = [sample["data_samples"].get("gt_label") for sample in packed]
            known = all(label is not None and label.numel() == 1 for label in labels)
            self._read[number] = torch.stack([s["inputs"] for s in packed]), torch.cat(labels) if known else None
        return self._read[number]


def choose_samples(length: int, num_samples: int | None, seed: int) -> list[int]:
    """Indices of ``num_samples`` different samples (None, or more than there are: all), by ``seed``, ascending."""
    if length < 1:
        raise ValueError("dataset: expected at least one sample, got none")
    check_integer("num_samples", num_samples, 1, none="all")
    check_seed("seed", seed)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(int(seed)))
    return sorted(order[:num_samples].tolist())


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
    """Squared Jacobian norms of ``model`` in eval mode and float32; the run around it does not notice.

    In a distributed run every rank has to call it. The ranks share out whole batches and join their values in one
    reduction, so that any number of ranks gives the same result. With equal seeds, the same sample meets the same
    probes in every measurement, so that what moves between two measurements is the network.

    Args:
        model: Classifier of mmpretrain, not wrapped.
        samples: What is measured on.
        output: ``'logits'``, ``'probs'`` or ``'label_prob'``, see :func:`enc_plugin.functional.gbr`.
        projections: Random orthonormal output directions for each sample; None: exact.
        space: What x is: ``'normalized'`` (what the network receives) or ``'pixel'`` (0..255, before normalisation).
        seed: Of the directions.
        progress: Called with the number of samples after each batch of this rank.

    Returns:
        The estimate, equal on all ranks.
    """
    check_space(space)
    check_seed("seed", seed)
    start = time.perf_counter()
    device = next(model.parameters()).device
    seeds = torch.randint(2**32, (len(samples),), generator=torch.Generator().manual_seed(int(seed)))
    positions = torch.arange(len(samples)).split([len(batch) for batch in samples.batches])
    values = torch.zeros(len(samples), dtype=torch.float64)
    with untouched(model), torch.autocast(device.type, enabled=False):
        classify = PixelClassifier(model)
        for number in samples.own:
            pixels, labels = samples.batch(number)
            x, forward = pixels.to(device).float(), classify
            if space == "normalized":
                x = model.data_preprocessor({"inputs": x}, training=False)["inputs"]
                forward = _tensor_mode(model)
            if output == "label_prob" and labels is None:
                raise ValueError("dataset: 'label_prob' needs one gt_label for each sample")
            where = positions[number]
            found = gbr(
                forward,
                x,
                output=output,
                labels=None if labels is None else labels.to(device),
                projections=projections,
                seeds=seeds[where],
                batch_size=len(x),
            )
            values[where] = found.double().cpu()
            if progress is not None:
                progress(len(x))
    all_reduce(values)
    return GBREstimate(values, time.perf_counter() - start)


def _tensor_mode(model: BaseModel) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x, mode="tensor")


def check_options(output: str, projections: int | None, space: str, num_samples: int | None) -> None:
    """Raise ``ValueError`` that names the option if a measurement could not be made with these."""
    check_output(output)
    check_projections(projections)
    check_space(space)
    check_integer("num_samples", num_samples, 2, none="all")  # two have a standard error


def check_space(space: str) -> None:
    """Raise ``ValueError`` unless ``space`` names what x is."""
    if not isinstance(space, str) or space not in SPACES:
        raise ValueError(f"space: expected one of {', '.join(map(repr, SPACES))}, got {space!r}")


def find_pipeline(dataset) -> list | None:
    """The pipeline of a dataset or its config, looked for within wrappers; None if there is none."""
    while dataset is not None:
        get = dataset.get if isinstance(dataset, dict) else lambda key, of=dataset: getattr(of, key, None)
        pipeline = get("pipeline")
        if pipeline is not None:
            return getattr(pipeline, "transforms", pipeline)
        inner = get("datasets")
        dataset = inner[0] if inner else get("dataset")
    return None
