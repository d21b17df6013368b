"""scikit-learn's handwritten digits as an mmpretrain dataset, which needs no download."""

from __future__ import annotations

import numpy as np
from mmengine.registry import DATASETS
from mmpretrain.datasets import BaseDataset

SPLITS = ("train", "test")


@DATASETS.register_module()
class Digits(BaseDataset):
    """The 1,797 handwritten digits (8x8) of scikit-learn, with a fixed split stratified by class.

    Every fifth image of each class, in file order, is a test image: there are 1,442 training and 355 test images. Each
    sample is ``dict(img=..., gt_label=...)`` with ``img`` an ``(8, 8, 3)`` uint8 array in 0..255 (three equal
    channels), so pipelines have no loading step, as for mmpretrain's CIFAR10.

    Args:
        split: ``'train'`` or ``'test'``.
        **kwargs: As for mmpretrain's ``BaseDataset``: ``pipeline``, ``indices``, ``test_mode``, ...

    Raises:
        ValueError: If ``split`` is unknown.
    """

    METAINFO = {"classes": [str(digit) for digit in range(10)]}

    def __init__(self, split: str = "train", **kwargs):
        if not isinstance(split, str) or split not in SPLITS:
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        self.split = split
        kwargs.setdefault("ann_file", "")
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """All samples of the split, in file order."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        labels = digits.target
        # Position of each image within its class. This split depends on no random generator of a library.
        position = np.empty_like(labels)
        for label in np.unique(labels):
            position[labels == label] = np.arange((labels == label).sum())
        chosen = (position % 5 == 4) == (self.split == "test")
        images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        images = np.repeat(images[..., None], 3, axis=-1)
        return [{"img": img, "gt_label": int(label)} for img, label in zip(images, labels[chosen], strict=True)]

    def extra_repr(self) -> list[str]:
        """The split, for the dataset's summary."""
        return [f"Split: \t{self.split}"]
