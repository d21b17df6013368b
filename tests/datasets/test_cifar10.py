"""Unpacking CIFAR-10 and reading it back; archives of the real layout with fewer pictures."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile

import cv2
import numpy as np
import pytest

from enc_plugin.datasets import CIFAR10Folder, prepare
from enc_plugin.datasets.cifar10 import CLASSES
from enc_plugin.datasets.prepare import prepare_cifar10


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(prepare, "PER_CLASS", {"train": 5, "test": 1})


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def make_zip(path, missing: str = ""):
    with zipfile.ZipFile(path, "w") as file:
        for split, count in prepare.PER_CLASS.items():
            for label, name in enumerate(CLASSES):
                for i in range(count):
                    member = f"{split}/{name}/{i:04d}.png"
                    if member != missing:
                        file.writestr(member, cv2.imencode(".png", picture(10 * i + label))[1].tobytes())
        file.writestr("../outside.png", b"not to be written")
    return path


def make_official(path, batch_of=pickle.dumps):
    with tarfile.open(path, "w:gz") as file:
        for i in range(6):
            name = "test_batch" if i == 5 else f"data_batch_{i + 1}"
            images = np.stack([picture(10 * i + label)[..., ::-1].transpose(2, 0, 1).ravel() for label in range(10)])
            content = batch_of({b"data": images, b"labels": list(range(10))})
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("make", [make_zip, make_official])
def test_both_archives_unpack_to_the_same_pictures(small, tmp_path, make):
    out = prepare_cifar10(make(tmp_path / "archive"), tmp_path / "cifar10")
    train, test = CIFAR10Folder(str(out), "train"), CIFAR10Folder(str(out), "test")
    assert (len(train), len(test)) == (50, 10)
    assert [test[i]["gt_label"] for i in range(10)] == list(range(10))
    expected = picture(3 if make is make_zip else 53)
    assert np.array_equal(test[3]["img"], expected)
    assert not (tmp_path / "outside.png").exists()


def test_a_short_archive_is_refused_and_leaves_nothing(small, tmp_path):
    archive = make_zip(tmp_path / "a.zip", missing="train/cat/0002.png")
    with pytest.raises(ValueError, match="expected 5 images of train/cat, .* has 4"):
        prepare_cifar10(archive, tmp_path / "cifar10")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_code_in_a_batch_is_not_run(small, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    archive = make_official(tmp_path / "a.tar.gz", batch_of=lambda _: pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not loaded, because it refers to builtins.print"):
        prepare_cifar10(archive, tmp_path / "cifar10")
    assert not (tmp_path / "cifar10").exists()


def test_bad_archives_and_existing_folders_are_named(tmp_path):
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(ValueError, match="neither a zip nor a tar file"):
        prepare_cifar10(tmp_path / "text.zip", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        prepare_cifar10(tmp_path / "none.zip", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already; remove it first"):
        prepare_cifar10(tmp_path / "text.zip", tmp_path / "out")


def test_missing_pictures_say_which_command_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python tools/prepare_cifar10\.py ARCHIVE --out"):
        CIFAR10Folder(str(tmp_path))


def test_a_balanced_part_of_the_pictures_can_be_taken(small, tmp_path):
    out = prepare_cifar10(make_zip(tmp_path / "archive"), tmp_path / "cifar10")
    part = CIFAR10Folder(str(out), "train", per_class=2)
    assert [part[i]["gt_label"] for i in range(len(part))] == [label for label in range(10) for _ in range(2)]
    assert np.array_equal(part[1]["img"], picture(20))  # evenly spaced: files 0 and 2 of five
    with pytest.raises(ValueError, match="per_class: expected at most 5 .*, got 6"):
        CIFAR10Folder(str(out), "train", per_class=6)


def test_a_damaged_picture_is_named(small, tmp_path):
    out = prepare_cifar10(make_zip(tmp_path / "archive"), tmp_path / "cifar10")
    (out / "test" / "cat" / "0000.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"test/cat/0000\.png cannot be decoded"):
        CIFAR10Folder(str(out), "test")
