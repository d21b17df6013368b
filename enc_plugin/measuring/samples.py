"""The samples of a measurement: chosen once, read once, and without augmentation."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable, Sequence

import numpy as np
import torch
from mmengine.dataset import Compose
from torch import Tensor
from torch.utils.data import Dataset

from ..functional.checks import check_integer, check_seed
from .loading_steps import without_loading
from .pipelines import WithoutReplacement, leaves, load, locate
from .pixels import PixelSpan, stack
from .ranks import joined, on_all_ranks, own_share


class FixedSamples:
    """Fixed samples of a dataset without augmentation, in batches, read once.

    The steps of the dataset's pipeline load a sample, up to the step that produces the image. Then the steps of
    ``pipeline`` run, except those that load. Each rank reads and keeps the batches that it will measure. The batches do
    not depend on the number of ranks. Samples that cannot be read are left out. All ranks must build the samples.

    Args:
        dataset: Dataset of mmengine or mmpretrain, inside of any wrappers (repeated, concatenated, balanced, folds,
            subsets). Or a dataset without a pipeline that returns packed samples, the same ones each time.
        pipeline: Transforms that end in ``PackInputs``, usually the test pipeline: configs or callables.
        indices: Indices of the samples, in this order.
        batch_size: Samples per batch.
        own_loading: Whether the dataset's steps load. False: all steps of ``pipeline`` run, and load.

    Raises:
        TypeError: If the dataset cannot return a sample without augmentation.
        ValueError: If samples cannot be read and fewer than two are left.
    """

    def __init__(
        self, dataset: Dataset, pipeline: Sequence, indices: Sequence[int], batch_size: int, *, own_loading: bool = True
    ):
        self.dataset = dataset
        self.batches = in_batches(indices, batch_size)
        self._steps = Compose(_own_copy(Compose(list(pipeline)).transforms))
        self._own_loading = own_loading
        self._kept: dict[int, Compose] = {}  # id of the innermost dataset -> steps after loading
        self._packed = _has_no_pipeline(dataset)
        if self._packed and len(indices):
            _check_packed(dataset, indices[0])
        self._read: dict[int, tuple[Tensor, Tensor | None]] = {}
        bad = on_all_ranks(lambda: [index for number in self.own for index in self._read_batch(number)])
        missing = {*joined(bad)}
        self.left_out = sorted(missing)
        self.batches = [[index for index in batch if index not in missing] for batch in self.batches]
        if missing and len(self) < 2:
            raise ValueError(
                f"dataset: {len(missing)} of {len(indices)} chosen samples cannot be read, but a standard error needs "
                "at least two; check the paths of the dataset"
            )

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    @property
    def own(self) -> range:
        """Numbers of the batches that this rank measures."""
        return own_share(len(self.batches))

    def _read_batch(self, number: int) -> list[int]:
        """Read and keep a batch, and return the indices of the samples that cannot be read."""
        samples = {index: self._sample(index) for index in self.batches[number]}
        found = [sample for sample in samples.values() if sample is not None]
        self._read[number] = stack(found) if found else (torch.zeros(0), None)
        return [index for index, sample in samples.items() if sample is None]

    def batch(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Pixels ``(N, C, H, W)`` of one of :attr:`own`, as the pipeline returns them, and labels ``(N,)`` or None."""
        return self._read[number]

    def check_pixels(self) -> None:
        """Raise ``ValueError`` unless the pixels of all ranks are in 0..255. All ranks must call it."""
        spans = [PixelSpan.of(self.batch(number)[0]) for number in self.own]
        PixelSpan.join(joined(spans)).check()

    def _sample(self, index: int) -> dict | None:
        """The packed sample; None if it cannot be read."""
        if self._packed:
            return self.dataset[index]
        leaf, info = locate(self.dataset, index)
        if not self._own_loading:
            return self._steps(info)
        picture = getattr(next(reversed(self._steps.transforms), None), "input_key", "img")
        try:
            results = load(leaf, info, picture)
        except Exception:
            if WithoutReplacement(self.dataset)[index] is not None:  # raises unless the dataset replaces it
                raise
            return None
        if results is None:
            return None
        if id(leaf) not in self._kept:
            self._kept[id(leaf)] = Compose(without_loading(self._steps.transforms, results, picture))
        return self._kept[id(leaf)](results)


def in_batches(indices: Sequence[int], batch_size: int) -> list[list[int]]:
    """Split ``indices`` into lists of ``batch_size``; the last one may be shorter."""
    check_integer("batch_size", batch_size, 1)
    return [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]


def choose_samples(dataset: Dataset | int, num_samples: int | None, seed: int) -> list[int]:
    """Choose ``num_samples`` different samples at random; returns their indices in ascending order.

    Args:
        dataset: A dataset, or its number of samples. If a dataset repeats a sample, the sample is chosen only once.
        num_samples: Number of samples. None, or more than there are: all.
        seed: Seed of the choice.
    """
    length = dataset if isinstance(dataset, int) else len(dataset)
    if length < 1:
        raise ValueError("dataset: expected at least one sample, got none")
    check_integer("num_samples", num_samples, 1, none="all")
    check_seed("seed", seed)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(int(seed)), device="cpu").tolist()
    if isinstance(dataset, int):
        return sorted(order[:num_samples])
    chosen: dict[object, int] = {}
    for index in order:
        chosen.setdefault(_identity(dataset, index), index)
        if len(chosen) == num_samples:
            break
    return sorted(chosen.values())


def _identity(dataset: Dataset, index: int) -> object:
    """A key that is equal for two indices exactly if they refer to the same sample."""
    if _has_no_pipeline(dataset):
        return index
    leaf, info = locate(dataset, index)
    info = dict(info)
    place = info.pop("sample_idx", None)
    # Two entries for one file are one sample. Two equal images in memory are two samples, unless their index in the
    # innermost dataset is equal, because the dataset was built twice.
    in_memory = any(isinstance(value, (np.ndarray, Tensor)) for value in info.values())
    try:
        content: object = hashlib.sha256(pickle.dumps(info)).digest()
    except (pickle.PicklingError, AttributeError, TypeError):
        content, in_memory = id(leaf), True
    return content, place if in_memory else None


def _has_no_pipeline(dataset: Dataset) -> bool:
    """Whether a dataset has no pipeline, and so must return packed samples."""
    return not leaves(dataset) and not hasattr(dataset, "get_data_info")


def _own_copy(steps: list[Callable]) -> list[Callable]:
    """Copies of ``steps``, because transforms may have a random state that the run uses."""
    try:
        return copy.deepcopy(steps)
    except Exception:  # a transform may hold open files or locks
        return steps


def _check_packed(dataset: Dataset, index: int) -> None:
    """Raise ``TypeError`` unless a dataset without a pipeline returns packed samples, the same ones each time."""
    name = type(dataset).__name__
    state = torch.get_rng_state()
    try:
        first, *others = (dataset[index] for _ in range(8))  # a flip shows in two reads only half of the time
    finally:
        torch.set_rng_state(state)
    if not isinstance(first, dict) or "inputs" not in first:
        raise TypeError(
            f"dataset: {name} has no get_data_info(index) and no pipeline, so its samples cannot be read without "
            "augmentation; derive it from mmpretrain's BaseDataset"
        )
    if not all(torch.equal(first["inputs"], other["inputs"]) for other in others):
        raise TypeError(
            f"dataset: {name} has no pipeline and returns another image each time, so its samples cannot be read "
            "without augmentation; derive it from mmpretrain's BaseDataset"
        )
