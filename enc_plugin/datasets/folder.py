"""Pictures in folders, one a class."""

from __future__ import annotations

from pathlib import Path

from mmengine.registry import DATASETS
from mmpretrain.datasets import CustomDataset


@DATASETS.register_module()
class ImageFolder(CustomDataset):
    """Pictures in ``<data_root>/<split>/<class>/``; takes the place of ``ImageNet`` in a stock config as it stands.

    Args:
        data_root: Folder of the splits.
        split: Folder below it, such as ``'train'`` or ``'val'``.
        **kwargs: As for mmpretrain's ``CustomDataset``: ``pipeline``, ``indices``, ...

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If its classes are not those of ``<data_root>/train``: labels would mean something else.
    """

    def __init__(self, data_root: str, split: str = "train", **kwargs):
        folder, train = Path(data_root, split), Path(data_root, "train")
        if not folder.is_dir():
            raise FileNotFoundError(f"data_root: there is no folder {folder} with a sub-folder for each class")
        if train.is_dir() and (other := _classes(train) ^ _classes(folder)):
            raise ValueError(
                f"data_root: {folder} and {train} have different classes: {', '.join(sorted(other)[:5])} in one of "
                "them only; make the missing folders, if need be empty ones"
            )
        super().__init__(data_root=data_root, data_prefix=split, with_label=True, **kwargs)


def _classes(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.is_dir()}
