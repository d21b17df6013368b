"""The embedded digits: fixed, stratified, disjoint."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from mmengine.registry import DATASETS
from sklearn.datasets import load_digits

from enc_plugin.datasets import Digits


def samples(split: str) -> list[dict]:
    dataset = Digits(split=split)
    return [dataset[i] for i in range(len(dataset))]


def test_the_split_is_stratified_and_covers_every_image_once():
    train, test = samples("train"), samples("test")
    assert len(train) + len(test) == 1797
    assert len(test) == pytest.approx(1797 / 5, abs=10)
    per_class = Counter(load_digits().target.tolist())
    assert Counter(s["gt_label"] for s in test) == {label: count // 5 for label, count in per_class.items()}
    rebuilt = sorted(s["img"][..., 0].tobytes() for s in train + test)
    original = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert rebuilt == sorted(image.tobytes() for image in original)


def test_images_are_three_equal_channels_of_bytes():
    sample = samples("test")[0]
    assert (sample["img"].shape, sample["img"].dtype) == ((8, 8, 3), np.uint8)
    assert (sample["img"] == sample["img"][..., :1]).all()
    assert sample["img"].max() == 255


def test_the_dataset_is_in_the_registry_and_knows_its_classes():
    dataset = DATASETS.build(dict(type="Digits", split="test"))
    assert dataset.metainfo["classes"] == [str(i) for i in range(10)]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'val'"):
        Digits(split="val")
