"""CIFAR-10 from a folder of image files, decoded once and kept in memory."""

from __future__ import annotations

from pathlib import Path

import mmcv
import numpy as np
from mmengine.registry import DATASETS
from mmpretrain.datasets import BaseDataset

from ..functional.checks import check_integer
from ..measuring.spread import spread
from .digits import SPLITS

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@DATASETS.register_module()
class CIFAR10Folder(BaseDataset):
    """CIFAR-10 in an ImageFolder layout, ``<data_root>/{train,test}/<class>/*.{jpg,png}``.

    The images are decoded once (about 150 MB for the training set), because decoding 50,000 small files in each epoch
    costs more than training a small network. Each sample is ``dict(img=..., gt_label=...)`` with ``img`` a
    ``(32, 32, 3)`` BGR uint8 array in 0..255, so pipelines have no loading step, as for mmpretrain's CIFAR10.

    Args:
        data_root: Folder that contains ``train`` and ``test``.
        split: ``'train'`` or ``'test'``.
        per_class: Number of images of each class, evenly spaced in file-name order; None: all.
        **kwargs: As for mmpretrain's ``BaseDataset``: ``pipeline``, ``indices``, ``test_mode``, ...

    Raises:
        ValueError: If ``split`` is unknown, a class has fewer than ``per_class`` images, or a file cannot be decoded.
        FileNotFoundError: If a class folder is missing or empty; says which command creates it.
    """

    METAINFO = {"classes": list(CLASSES)}

    def __init__(self, data_root: str = "data/cifar10", split: str = "train", per_class: int | None = None, **kwargs):
        if not isinstance(split, str) or split not in SPLITS:
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        check_integer("per_class", per_class, 1, none="all")
        self.split, self.per_class = split, per_class
        super().__init__(ann_file="", data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """All samples of the split, class by class, in file-name order."""
        samples = []
        for label, name in enumerate(CLASSES):
            folder = Path(self.data_root, self.split, name)
            files = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".png"))
            if not files:
                raise FileNotFoundError(
                    f"data_root: no images in {folder}; unpack cifar-10-python.tar.gz or cifar10.zip with: "
                    f"python tools/prepare_cifar10.py ARCHIVE --out {self.data_root}"
                )
            if self.per_class is not None:
                if self.per_class > len(files):
                    raise ValueError(
                        f"per_class: expected at most {len(files)} (images in {folder}), got {self.per_class}"
                    )
                files = [files[i] for i in spread(len(files), self.per_class)]
            samples += [{"img": _read(path), "gt_label": label} for path in files]
        return samples

    def extra_repr(self) -> list[str]:
        """Folder and split, for the dataset's summary."""
        return [f"Root: \t{self.data_root}", f"Split: \t{self.split}"]


def _read(path: Path) -> np.ndarray:
    image = mmcv.imread(str(path))
    if image is None:  # what OpenCV returns for a damaged file
        raise ValueError(f"data_root: {path} cannot be decoded; unpack the archive again")
    return image
