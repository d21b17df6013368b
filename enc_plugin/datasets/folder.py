"""Dataset of image files in folders, one folder per class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmengine.registry import DATASETS
from mmpretrain.datasets import CustomDataset


@DATASETS.register_module()
class ImageFolder(CustomDataset):
    """Image files in ``<data_root>/<split>/<class>/``; replaces the type ``ImageNet`` in a stock config.

    Args:
        data_root: Folder that contains the splits.
        split: Folder below it, such as ``'train'`` or ``'val'``; None: ``data_prefix``, or else ``'train'``.
        data_prefix: As ``split``, or ``dict(img_path=split)``: some stock configs of ImageNet give the folder so.
        ann_file: Not read, because the folders tell the classes; for stock configs that name one.
        **kwargs: As for mmpretrain's ``CustomDataset``: ``pipeline``, ``indices``, ...

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If its class folders differ from those of ``<data_root>/train``, so that labels would differ.
    """

    def __init__(
        self,
        data_root: str,
        split: str | None = None,
        data_prefix: str | Mapping[str, str] = "",
        ann_file: str = "",
        **kwargs,
    ):
        prefix = data_prefix.get("img_path", "") if isinstance(data_prefix, Mapping) else data_prefix
        split = split or prefix or "train"
        folder, train = Path(data_root, split), Path(data_root, "train")
        if not folder.is_dir():
            raise FileNotFoundError(f"data_root: there is no folder {folder} with a sub-folder for each class")
        if train.is_dir() and (other := _classes(train) ^ _classes(folder)):
            raise ValueError(
                f"data_root: {folder} and {train} have different classes: only one has {', '.join(sorted(other)[:5])}; "
                "create the missing folders, empty ones if necessary"
            )
        super().__init__(data_root=data_root, data_prefix=split, with_label=True, **kwargs)


def _classes(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.is_dir()}
