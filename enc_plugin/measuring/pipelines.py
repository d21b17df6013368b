"""The pipelines of a dataset within any wrappers: how a sample is read without augmentation or replacement."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.dataset import Compose
from torch.utils.data import Dataset


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


def sample_of(dataset: Dataset, index: int) -> Any:
    """A sample as training gets it, by a copy of the transforms: some own a random generator."""
    steps = find_pipeline(dataset)
    if steps is None or not hasattr(dataset, "get_data_info"):
        return dataset[index]
    sample = Compose(copy.deepcopy(steps))(dataset.get_data_info(index))
    return dataset[index] if sample is None else sample  # it takes another one for a picture that is damaged


def locate(dataset: Dataset, index: int) -> tuple[object, dict]:
    """The dataset within all wrappers that holds a sample, and what it gives to its pipeline.

    The wrappers are asked for the sample, and it is taken where the pipeline would begin.
    """

    def stop(leaf: object, own: Callable) -> Callable[[dict], dict]:
        def run(info: dict) -> dict:
            raise _Stop(leaf, info)

        return run

    if not leaves(dataset):
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


def leaves(dataset: object) -> list:
    """The datasets that have a pipeline, within any wrappers, each once."""
    if getattr(dataset, "pipeline", None) is not None:
        return [dataset]
    inner = [*(getattr(dataset, "datasets", None) or []), getattr(dataset, "dataset", None)]
    found = {id(leaf): leaf for one in inner if one is not None for leaf in leaves(one)}
    return list(found.values())


@contextmanager
def _pipelines(dataset: Dataset, replace: Callable[[object, Callable], Callable]) -> Iterator[None]:
    """Block in which each dataset's pipeline is what ``replace(dataset, pipeline)`` makes of it."""
    own = [(leaf, leaf.pipeline) for leaf in leaves(dataset)]
    try:
        for leaf, pipeline in own:
            leaf.pipeline = Compose([replace(leaf, pipeline)])
        yield
    finally:
        for leaf, pipeline in own:
            leaf.pipeline = pipeline


def load(leaf: object, info: dict, picture: str) -> dict | None:
    """What the dataset's own steps make of ``info`` until the picture is there; None if it cannot be read."""
    pipeline = getattr(leaf, "pipeline", None)
    results: dict | None = info
    for step in getattr(pipeline, "transforms", pipeline) or []:
        if results is None or picture in results:
            break
        results = step(results)
    return results
