"""Samples for measurements: which ones, read by whose steps, and in which unit their pixels are."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.dist import all_gather_object, get_dist_info
from torch import Tensor
from torch.utils.data import Dataset

from ..functional.checks import check_integer, check_seed

PIXEL_MAX = 255.0


class _Stop(BaseException):
    """Leaves a dataset with what its pipeline was given; no ``except Exception`` that takes another sample holds it."""

    def __init__(self, dataset: object, info: dict | None):
        super().__init__()
        self.dataset, self.info = dataset, info


class WithoutReplacement(Dataset):
    """A dataset whose unreadable samples are None, where mmengine's datasets take another sample by chance.

    mmengine's datasets draw a replacement if the pipeline returns None (``LoadImageFromFile(ignore_empty=True)`` does
    for a missing picture), other datasets if it fails. A measurement would count the replacement twice, and depend on
    the random state. A dataset that lets its pipeline fail fails here too.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict | None:
        """The sample under the dataset's own pipeline, or None."""

        calls = 0

        def guarded(leaf: object, own: Callable[[dict], dict | None]) -> Callable[[dict], dict]:
            def run(info: dict) -> dict:
                nonlocal calls
                calls += 1
                sample = own(info) if calls == 1 else None  # a second call is for the replacement
                if sample is None:
                    raise _Stop(leaf, None)
                return sample

            return run

        try:
            with _pipelines(self.dataset, guarded):
                return self.dataset[index]
        except _Stop:
            return None


class FixedSamples:
    """The same samples of a dataset without augmentation, in batches, read once.

    A sample is loaded by the dataset's own steps: those of its pipeline until the picture is there. Then come the steps
    of ``pipeline`` without its own loading, which are the steps that make a picture without having read one. Each rank
    reads and keeps the batches that it will measure; batches are the same for any number of ranks.

    Args:
        dataset: Dataset of mmengine or mmpretrain, within any wrappers (repeated, concatenated, balanced, folds,
            subsets); or one that returns packed samples and has no pipeline, if it returns the same sample each time.
        pipeline: Transforms that end in ``PackInputs``, usually the test pipeline: configs or callables.
        indices: Which samples, in this order.
        batch_size: Samples per batch.
        own_loading: Whether the dataset loads; False: ``pipeline`` does, from the first step to the last.

    Raises:
        TypeError: If the dataset cannot hand out a sample without augmentation.
    """

    def __init__(
        self,
        dataset: Dataset,
        pipeline: Sequence,
        indices: Sequence[int],
        batch_size: int,
        *,
        own_loading: bool = True,
    ):
        check_integer("batch_size", batch_size, 1)
        self.dataset = dataset
        self.batches = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        self.left_out: list[int] = []
        self._steps = _own_copy(Compose(list(pipeline)).transforms)
        self._own_loading = own_loading
        self._kept: dict[int, list[Callable]] = {}  # by dataset within the wrappers
        self._packed = not _leaves(dataset) and not hasattr(dataset, "get_data_info")
        if self._packed and len(indices):
            _check_packed(dataset, indices[0])
        self._read: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    @property
    def indices(self) -> list[int]:
        """Which samples, in the order of the batches."""
        return [index for batch in self.batches for index in batch]

    @property
    def own(self) -> range:
        """Numbers of the batches that this rank measures."""
        rank, world_size = get_dist_info()
        return range(rank, len(self.batches), world_size)

    def read(self) -> FixedSamples:
        """Read this rank's batches now, and leave out samples that cannot be read. Every rank has to call it.

        Raises:
            ValueError: If fewer than two samples are left.
        """
        bad: list[int] = []
        error: Exception | None = None
        try:
            for number in self.own:
                bad += self._read_batch(number)
        except Exception as failure:  # the other ranks wait: they have to end, too
            error = failure
        told = all_gather_object((bad, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        if any(reason for _, reason in told):
            raise ValueError(f"dataset: another rank cannot read it ({next(reason for _, reason in told if reason)})")
        missing = {index for part, _ in told for index in part}
        if missing:
            self.left_out += sorted(missing)
            self.batches = [[index for index in batch if index not in missing] for batch in self.batches]
            if len(self) < 2:
                raise ValueError(
                    f"dataset: {len(missing)} of {len(missing) + len(self)} chosen samples cannot be read, and two are "
                    "the least for a standard error"
                )
        return self

    def _read_batch(self, number: int) -> list[int]:
        """Read a batch and keep it without what cannot be read, whose indices are returned."""
        samples = {index: self._sample(index) for index in self.batches[number]}
        found = [sample for sample in samples.values() if sample is not None]
        self._read[number] = _stack(found) if found else (torch.zeros(0), None)
        return [index for index, sample in samples.items() if sample is None]

    def batch(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Pixels ``(N, C, H, W)`` as the pipeline delivers them, and labels ``(N,)`` (None if there are none)."""
        if number not in self._read:
            self._read[number] = _stack([self._sample(index) for index in self.batches[number]])
        return self._read[number]

    def check_pixels(self) -> None:
        """Raise ``ValueError`` unless the pixels of all ranks are in 0..255. Every rank has to call it."""
        spans = [PixelSpan.of(self.batch(number)[0]) for number in self.own]
        PixelSpan.join([span for part in all_gather_object(spans) for span in part]).check()

    def _sample(self, index: int) -> dict | None:
        """The packed sample; None if it cannot be read."""
        if self._packed:
            return self.dataset[index]
        leaf, info = locate(self.dataset, index)
        if not self._own_loading:
            return _run(self._steps, info)
        picture = getattr(self._steps[-1], "input_key", "img") if self._steps else "img"
        try:
            results = _load(leaf, info, picture)
        except Exception:
            if WithoutReplacement(self.dataset)[index] is not None:  # fails too, unless the dataset would replace it
                raise
            return None
        if results is None:
            return None
        if id(leaf) not in self._kept:
            self._kept[id(leaf)] = _without_loading(self._steps, results, picture)
        return _run(self._kept[id(leaf)], results)


class PixelSpan:
    """Smallest and largest of many pixels, and whether they are floating point."""

    def __init__(self, low: float, high: float, floating: bool):
        self.low, self.high, self.floating = low, high, floating

    @classmethod
    def of(cls, pixels: Tensor) -> PixelSpan:
        """That of a tensor."""
        if not pixels.numel():
            return cls(0.0, 0.0, False)
        low, high = (bound.item() for bound in pixels.aminmax())
        return cls(low, high, pixels.is_floating_point())

    @classmethod
    def join(cls, spans: Sequence[PixelSpan]) -> PixelSpan:
        """That of all together."""
        low, high = min((s.low for s in spans), default=0.0), max((s.high for s in spans), default=0.0)
        return cls(low, high, any(s.floating for s in spans))

    def check(self, whole: bool = True) -> None:
        """Raise ``ValueError`` unless the range is 0..255.

        Args:
            whole: These are all pixels. Of a part, 0..1 says nothing: it may be a dark picture.
        """
        if not 0 <= self.low <= self.high <= PIXEL_MAX or (whole and self.floating and 0 < self.high <= 1):
            raise ValueError(
                f"dataset: expected pixels in 0..255, got {self.low:g}..{self.high:g}; the unit is 1/255 of that "
                "range, so leave scaling and normalisation to the model's data_preprocessor (mean, std) and not to the "
                "pipeline"
            )


def choose_samples(dataset: Dataset | int, num_samples: int | None, seed: int) -> list[int]:
    """Indices of ``num_samples`` different samples (None, or more than there are: all), by ``seed``, ascending.

    Args:
        dataset: A dataset, of which no sample is taken twice however often it is repeated; or a number of samples.
        num_samples: How many.
        seed: Of the choice.
    """
    length = dataset if isinstance(dataset, int) else len(dataset)
    if length < 1:
        raise ValueError("dataset: expected at least one sample, got none")
    check_integer("num_samples", num_samples, 1, none="all")
    check_seed("seed", seed)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(int(seed))).tolist()
    if isinstance(dataset, int):
        return sorted(order[:num_samples])
    chosen: dict[object, int] = {}
    for index in order:
        chosen.setdefault(_identity(dataset, index), index)
        if len(chosen) == num_samples:
            break
    return sorted(chosen.values())


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


def locate(dataset: Dataset, index: int) -> tuple[object, dict]:
    """The dataset within all wrappers that holds a sample, and what that gives to its pipeline for it.

    Observed and not computed: the wrappers are asked for the sample, and it is taken where the pipeline would begin.
    """

    def stop(leaf: object, own: Callable) -> Callable[[dict], dict]:
        def run(info: dict) -> dict:
            raise _Stop(leaf, info)

        return run

    if not _leaves(dataset):
        return dataset, dataset.get_data_info(index)
    try:
        with _pipelines(dataset, stop):
            dataset[index]
    except _Stop as found:
        return found.dataset, found.info
    raise TypeError(
        f"dataset: {type(dataset).__name__} does not run the pipelines of the datasets within it, so that its samples "
        "cannot be read without augmentation; derive it from mmpretrain's BaseDataset"
    )


def _leaves(dataset: object) -> list:
    """The datasets that have a pipeline, within any wrappers, each once."""
    if getattr(dataset, "pipeline", None) is not None:
        return [dataset]
    inner = [*(getattr(dataset, "datasets", None) or []), getattr(dataset, "dataset", None)]
    found = {id(leaf): leaf for one in inner if one is not None for leaf in _leaves(one)}
    return list(found.values())


@contextmanager
def _pipelines(dataset: Dataset, replace: Callable[[object, Callable], Callable]) -> Iterator[None]:
    """Block in which each dataset's pipeline is what ``replace(dataset, pipeline)`` makes of it."""
    own = [(leaf, leaf.pipeline) for leaf in _leaves(dataset)]
    try:
        for leaf, pipeline in own:
            leaf.pipeline = Compose([replace(leaf, pipeline)])
        yield
    finally:
        for leaf, pipeline in own:
            leaf.pipeline = pipeline


def _identity(dataset: Dataset, index: int) -> object:
    """Equal for two indices exactly if they stand for the same sample."""
    if not _leaves(dataset) and not hasattr(dataset, "get_data_info"):
        return index
    leaf, info = locate(dataset, index)
    info = dict(info)
    place = info.pop("sample_idx", None)
    # Two names of one file are one sample. Two equal pictures in memory are two, unless one dataset was built twice.
    in_memory = any(isinstance(value, (np.ndarray, Tensor)) for value in info.values())
    try:
        content: object = hashlib.sha256(pickle.dumps(info)).digest()
    except (pickle.PicklingError, AttributeError, TypeError):
        content, in_memory = id(leaf), True
    return content, place if in_memory else None


def _load(leaf: object, info: dict, picture: str) -> dict | None:
    """What the dataset's own steps make of ``info`` until the picture is there; None if it cannot be read."""
    pipeline = getattr(leaf, "pipeline", None)
    results: dict | None = info
    for step in getattr(pipeline, "transforms", pipeline) or []:
        if results is None or picture in results:
            break
        results = step(results)
    return results


def _without_loading(steps: Sequence[Callable], results: dict, picture: str) -> list[Callable]:
    """Those of ``steps`` that do something to a picture: all but those that load one, or a label.

    Observed on one loaded sample: a step that makes a picture or a label without having read the picture loads, and so
    does one that fails before any step has read it, because it may look for a file that is not there.
    """
    kept: list[Callable] = []
    begun = False
    for step in steps:
        last = step is steps[-1]
        watched = _Watched(copy.deepcopy(dict(results)), picture, _Notes())
        before, notes = dict.get(watched, picture), watched.notes
        try:
            after = step(watched)
        except Exception:
            if begun or notes.read or last:
                raise
            continue
        if not notes.read and not last:
            other = after is None or (not isinstance(after, _Watched) and after.get(picture) is not before)
            if other or notes.loaded:
                continue
        begun = begun or notes.read
        kept.append(step)
        if not last:
            results = dict(after)
    return kept


class _Notes:
    """What a step did to a watched sample: it read the picture that was there, it made another, it wrote a label."""

    read = False
    made = False
    labelled = False

    @property
    def loaded(self) -> bool:
        return not self.read and (self.made or self.labelled)


class _Watched(dict):
    """A sample that takes notes of what a step reads and writes, in its copies too."""

    def __init__(self, values: dict, picture: str, notes: _Notes):
        super().__init__(values)
        self.picture, self.notes = picture, notes

    def _note(self, key: object) -> None:
        if key == self.picture and not self.notes.made:
            self.notes.read = True

    def __getitem__(self, key):
        self._note(key)
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        self.notes.made = self.notes.made or key == self.picture
        self.notes.labelled = self.notes.labelled or str(key).startswith("gt_")
        super().__setitem__(key, value)

    def __copy__(self):
        return _Watched(dict(super().items()), self.picture, self.notes)

    def __deepcopy__(self, memo):
        return _Watched(copy.deepcopy(dict(super().items()), memo), self.picture, self.notes)

    def get(self, key, default=None):
        """As of a dict."""
        self._note(key)
        return super().get(key, default)

    def pop(self, key, *default):
        """As of a dict."""
        self._note(key)
        return super().pop(key, *default)

    def items(self):
        """As of a dict: the picture is among them."""
        self._note(self.picture)
        return super().items()

    def values(self):
        """As of a dict: the picture is among them."""
        self._note(self.picture)
        return super().values()

    def copy(self):
        """As of a dict, with the same notes."""
        return self.__copy__()

    def update(self, *others, **values):
        """As of a dict."""
        for key, value in dict(*others, **values).items():
            self[key] = value


def _own_copy(steps: list[Callable]) -> list[Callable]:
    """Copies of ``steps``, because those of a dataset may have random states that the run goes on with."""
    try:
        return copy.deepcopy(steps)
    except Exception:  # open files, locks: any transform can hold them
        return steps


def _run(steps: Sequence[Callable], results: dict) -> dict | None:
    for step in steps:
        results = step(results)
        if results is None:
            return None
    return results


def _stack(packed: Sequence[dict]) -> tuple[Tensor, Tensor | None]:
    """Pixels and labels of packed samples."""
    if any("inputs" not in sample for sample in packed):
        raise ValueError(
            "pipeline: there is no picture to pack; end it with PackInputs, and begin it with a loading step, such as "
            "LoadImageFromFile, if it is to take the place of the dataset's own loading"
        )
    shapes = {tuple(sample["inputs"].shape) for sample in packed}
    if len(shapes) > 1:
        raise ValueError(
            f"pipeline: expected images of one size, got {', '.join(map(str, sorted(shapes)))}; resize or crop "
            "them in the test pipeline, or use batch_size=1"
        )
    labels = [sample["data_samples"].get("gt_label") for sample in packed]
    known = all(label is not None and label.numel() == 1 for label in labels)
    return torch.stack([sample["inputs"] for sample in packed]), torch.cat(labels) if known else None


def _check_packed(dataset: Dataset, index: int) -> None:
    """Raise ``TypeError`` unless a dataset without a pipeline returns packed samples, the same each time."""
    name = type(dataset).__name__
    state = torch.get_rng_state()
    try:
        first, second = dataset[index], dataset[index]
    finally:
        torch.set_rng_state(state)
    if not isinstance(first, dict) or "inputs" not in first:
        raise TypeError(
            f"dataset: {name} has no get_data_info(index) and no pipeline, which mmengine's datasets have, so that its "
            "samples cannot be read without augmentation; derive it from mmpretrain's BaseDataset"
        )
    if not torch.equal(first["inputs"], second["inputs"]):
        raise TypeError(
            f"dataset: {name} has no pipeline and returns another picture each time, so that its samples cannot be "
            "read without augmentation; derive it from mmpretrain's BaseDataset"
        )
