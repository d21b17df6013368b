"""Reading a sample of a dataset, inside of any wrappers, without augmentation and without replacement."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.dataset import Compose
from torch.utils.data import Dataset


class _Stop(BaseException):
    """Leaves a dataset's ``__getitem__`` with the argument of its pipeline.

    A ``BaseException``, because datasets catch ``Exception`` to draw another sample.
    """

    def __init__(self, dataset: object, info: dict | None):
        super().__init__()
        self.dataset, self.info = dataset, info


class WithoutReplacement(Dataset):
    """A dataset that returns None for a sample that cannot be read, instead of a random replacement.

    mmengine's datasets draw a replacement if the pipeline returns None (``LoadImageFromFile(ignore_empty=True)`` does
    for a missing image), other datasets if the pipeline raises. A measurement would then count another sample twice and
    depend on the random state. If a dataset does not handle an exception of its pipeline, it is raised here too.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict | None:
        """The sample after the dataset's pipeline, or None."""
        calls = 0

        def guarded(leaf: object, own: Callable[[dict], dict | None]) -> Callable[[dict], dict]:
            def run(info: dict) -> dict:
                nonlocal calls
                calls += 1
                sample = own(info) if calls == 1 else None  # a second call would be for a replacement
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
    """The pipeline of a dataset or its config, also inside of wrappers; None if there is none."""
    while dataset is not None:
        get = dataset.get if isinstance(dataset, dict) else lambda key, of=dataset: getattr(of, key, None)
        pipeline = get("pipeline")
        if pipeline is not None:
            return getattr(pipeline, "transforms", pipeline)
        inner = get("datasets")
        dataset = inner[0] if inner else get("dataset")
    return None


def sample_of(dataset: Dataset, index: int) -> Any:
    """A sample as in training, by copies of the transforms, because some transforms have a random generator."""
    steps = find_pipeline(dataset)
    if steps is None or not hasattr(dataset, "get_data_info"):
        return dataset[index]
    sample = Compose(copy.deepcopy(steps))(dataset.get_data_info(index))
    return dataset[index] if sample is None else sample  # the dataset replaces a damaged image by another sample


def locate(dataset: Dataset, index: int) -> tuple[object, dict]:
    """The innermost dataset of a sample, inside of all wrappers, and the argument that it passes to its pipeline.

    The wrappers are indexed as usual, and the sample is intercepted at the start of the pipeline.
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
        f"dataset: {type(dataset).__name__} does not run the pipelines of the datasets inside of it, so its samples "
        "cannot be read without augmentation; derive it from mmpretrain's BaseDataset"
    )


def leaves(dataset: Any) -> list:
    """The datasets with a pipeline, inside of any wrappers, each once."""
    # mmengine's slice of a dataset (num_batch_per_epoch) passes on the attributes of that dataset as its own.
    own = getattr(dataset, "__dict__", {})
    if ("pipeline" in own or hasattr(type(dataset), "pipeline")) and dataset.pipeline is not None:
        return [dataset]
    inner = [*(getattr(dataset, "datasets", None) or []), getattr(dataset, "dataset", None), own.get("_dataset")]
    found = {id(leaf): leaf for one in inner if one is not None for leaf in leaves(one)}
    return list(found.values())


@contextmanager
def _pipelines(dataset: Dataset, replace: Callable[[object, Callable], Callable]) -> Iterator[None]:
    """Within the context, replace the pipeline of each dataset by ``replace(dataset, pipeline)``."""
    own = [(leaf, leaf.pipeline) for leaf in leaves(dataset)]
    try:
        for leaf, pipeline in own:
            leaf.pipeline = Compose([replace(leaf, pipeline)])
        yield
    finally:
        for leaf, pipeline in own:
            leaf.pipeline = pipeline


def load(leaf: object, info: dict, picture: str) -> dict | None:
    """Run the dataset's pipeline on ``info`` until the key ``picture`` exists; None if a step returns None."""
    pipeline = getattr(leaf, "pipeline", None)
    results: dict | None = info
    for step in getattr(pipeline, "transforms", pipeline) or []:
        if results is None or picture in results:
            break
        results = step(results)
    return results
