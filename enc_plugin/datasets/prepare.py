"""Unpacks CIFAR-10 archives for :class:`CIFAR10Folder`."""

from __future__ import annotations

import pickle
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from ..refused import require_file
from .cifar10 import CLASSES

PER_CLASS = {"train": 5000, "test": 1000}
NUM_IMAGES = len(CLASSES) * sum(PER_CLASS.values())

_PICTURE = re.compile(rf"(?:.*/)?(train|test)/({'|'.join(CLASSES)})/([\w.-]+\.(?:jpg|png))$")
_BATCH = re.compile(r"(?:.*/)?(data_batch_[1-5]|test_batch)$")


def prepare_cifar10(archive: str | Path, out: str | Path) -> Path:
    """Unpack CIFAR-10 into ``out/{train,test}/<class>/``, with a progress bar, and check the number of images.

    Args:
        archive: ``cifar10.zip``, with image files in an ImageFolder layout, or the official
            ``cifar-10-python.tar.gz``, whose images are written as PNG.
        out: Folder to create. It appears only when it is complete.

    Returns:
        ``out`` as a path.

    Raises:
        FileNotFoundError: If there is no archive.
        FileExistsError: If ``out`` exists.
        ValueError: If the archive is neither of the two, or does not contain 5,000 training and 1,000 test images of
            each class.
    """
    archive, out = Path(archive), Path(out)
    require_file("archive", archive, "expected cifar10.zip or cifar-10-python.tar.gz")
    if out.exists():
        raise FileExistsError(f"out: {out} exists already; remove it first to unpack again")
    if zipfile.is_zipfile(archive):
        pictures = _from_zip(archive)
    elif tarfile.is_tarfile(archive):
        pictures = _from_official(archive)
    else:
        raise ValueError(f"archive: {archive} is neither a zip nor a tar file; is the download complete?")

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for split in PER_CLASS:
            for name in CLASSES:
                (partial / split / name).mkdir(parents=True)
        counts: Counter[tuple[str, str]] = Counter()
        for split, name, file_name, content in track(pictures, f"Unpacking to {out}", total=NUM_IMAGES):
            (partial / split / name / file_name).write_bytes(content)
            counts[split, name] += 1
        for split, expected in PER_CLASS.items():
            for name in CLASSES:
                if counts[split, name] != expected:
                    raise ValueError(
                        f"archive: expected {expected} images of {split}/{name}, {archive} has {counts[split, name]}; "
                        "is the download complete?"
                    )
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _from_zip(archive: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Split, class, file name and content of each image of a zip file in an ImageFolder layout."""
    with zipfile.ZipFile(archive) as file:
        for member in file.namelist():
            # The pattern matches whole names, so a member cannot be written outside of the folder.
            if match := _PICTURE.match(member):
                yield *match.groups(), file.read(member)


def _from_official(archive: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Split, class, file name and content (PNG) of each image of the official archive."""
    with tarfile.open(archive) as file:
        for member in file:
            match = _BATCH.match(member.name)
            stream = file.extractfile(member) if match else None
            if stream is None:
                continue
            batch = _ArrayUnpickler(stream, encoding="bytes").load()
            split = "test" if match.group(1) == "test_batch" else "train"
            images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)[..., ::-1]  # RGB planes to BGR pixels
            for i, (image, label) in enumerate(zip(images, batch[b"labels"], strict=True)):
                content = cv2.imencode(".png", np.ascontiguousarray(image))[1].tobytes()
                yield split, CLASSES[label], f"{match.group(1)}_{i:05d}.png", content


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain containers and NumPy arrays, and refuses anything else, which could run code."""

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar"):
            return super().find_class(module, name)
        raise ValueError(f"archive: it was not loaded, because it refers to {module}.{name}, unlike CIFAR-10")
