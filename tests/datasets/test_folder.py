"""Pictures in folders, one a class."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS

import enc_plugin  # noqa: F401


def build(root, split: str):
    return DATASETS.build(dict(type="ImageFolder", data_root=str(root), split=split))


@pytest.fixture
def pictures(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(tmp_path / split / name / f"{i}.png"), np.full((4, 4, 3), label, np.uint8))
    return tmp_path


def test_splits_have_the_folders_pictures_and_classes(pictures):
    train, val = build(pictures, "train"), build(pictures, "val")
    assert len(train) == 6
    assert len(val) == 2
    assert train.metainfo["classes"] == val.metainfo["classes"] == ("cat", "dog")
    assert [int(cv2.imread(val.get_data_info(i)["img_path"])[0, 0, 0]) for i in range(2)] == [0, 1]
    assert [val.get_data_info(i)["gt_label"] for i in range(2)] == [0, 1]


@pytest.mark.parametrize("prefix", ["val", dict(img_path="val/")])
def test_a_stock_config_may_name_the_folder_by_its_prefix_and_a_file_of_labels(pictures, prefix):
    stock = dict(type="ImageNet", data_root="data/imagenet", ann_file="meta/val.txt", data_prefix=prefix)
    assert len(DATASETS.build(stock | dict(type="ImageFolder", data_root=str(pictures)))) == 2


def test_other_classes_than_those_of_training_are_refused(pictures):
    (pictures / "val" / "cat").rename(pictures / "val" / "horse")
    with pytest.raises(ValueError, match="different classes: only one has cat, horse"):
        build(pictures, "val")


def test_a_missing_folder_is_named(pictures):
    with pytest.raises(FileNotFoundError, match="there is no folder .*test with a sub-folder for each class"):
        build(pictures, "test")
