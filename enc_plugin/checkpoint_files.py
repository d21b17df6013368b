"""Checkpoint files on disk: written whole or not at all, checked for damage, and found again."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .refused import describe

# Errors of file systems that cannot sync a file or folder: network shares, shared folders, Windows.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Context that replaces ``path`` by a complete new file, or leaves it as it was if an exception is raised.

    Yields the temporary path to write to, in the same folder. ``path`` changes only once the new file is on the disk.
    After a crash, the next attempt overwrites the temporary file.
    """
    path = Path(os.path.realpath(path))  # replace the target of a link, not the link
    name = f".{path.stem}.partial{path.suffix}"
    partial = path.with_name(name if len(os.fsencode(name)) < 256 else f".partial{path.suffix}")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)  # so that the new name survives a power failure too
    finally:
        partial.unlink(missing_ok=True)


def find_damage(path: str | Path) -> str | None:
    """Short description of what is wrong with a checkpoint file, or None if nothing is.

    Checks the checksums, which ``torch.load`` does not: it loads flipped bits. Files that are not in torch's zip format
    have no checksums, and pass if they are not empty.
    """
    path = Path(path)
    if not path.is_file():
        return "there is no such file"
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if not start.strip(b"\0"):
            return "it is empty" if path.stat().st_size == 0 else "it starts with zeros"
        if start != b"PK\3\4":
            return None
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # of many kinds, if a bit of a header was flipped: EOFError, RuntimeError, ...
        return describe(error, 200)
    return None if broken is None else f"the checksum of its record {broken!r} is wrong"


def latest_checkpoint(work_dir: str | Path, candidates: Iterable[Path]) -> tuple[str | None, list[str]]:
    """Checkpoint to resume from: the one that ``last_checkpoint`` names, or the newest undamaged one.

    Args:
        work_dir: Folder of the file ``last_checkpoint``.
        candidates: Checkpoints to fall back on.

    Returns:
        Path of the checkpoint, or None if there is none; and a description of each better choice that is damaged.
    """
    pointer = Path(work_dir, "last_checkpoint")
    candidates = sorted((path for path in candidates if path.is_file()), key=_age, reverse=True)
    problems = []
    if pointer.is_file():
        named = pointer.read_text(errors="replace").strip()
        if "://" in named or Path(named or "nowhere").is_dir():  # a URL or a sharded checkpoint is not checked
            return named, []
        # In a work dir that was moved or copied, last_checkpoint holds the old path.
        own = [path for path in candidates if path.name == Path(named).name]
        candidates = [*(own or [Path(named)]), *candidates] if named else candidates
        if not named:
            problems.append(f"{pointer}: it is empty")
    elif candidates:
        problems.append(f"{pointer}: there is no such file")
    for path in dict.fromkeys(candidates):
        damage = find_damage(path)
        if damage is None:
            return str(path), problems
        problems.append(f"{path}: {damage}")
    return None, problems


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, if the file system supports that."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs only files open for writing
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _age(path: Path) -> tuple[int, list[int]]:
    """Sort key: modification time, then the numbers in the file name."""
    return path.stat().st_mtime_ns, [int(part) for part in re.findall(r"\d+", path.stem)]
