"""Checkpoints of mmengine under ``torch.load(weights_only=True)``, the default since torch 2.6."""

from __future__ import annotations

from .installation import needs_mmengine  # noqa: F401

# isort: split
import errno
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from .layers.origin import KEY
from .refused import describe, require_file

_STATISTICS = ("min", "max", "mean", "current")
# Where mmengine and timm, torchvision, and timm's and torchvision's averages keep a state dict within a file.
_PLACES = ("state_dict", "model", "state_dict_ema", "model_ema")

# What network shares, shared folders and Windows answer where they cannot sync (a folder, mostly); others are failures.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF)


def _history_statistic(owner: type, name: str):
    """Stand-in for ``getattr`` in checkpoints: HistoryBuffer pickles its own statistics by name, nothing else may."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(owner, name)
    raise ValueError(
        f"checkpoint: it asks for attribute {name!r} of {owner!r}, which no mmengine checkpoint needs; "
        "load it only if you trust its source, with torch.load(..., weights_only=False)"
    )


def allow_mmengine_checkpoints() -> None:
    """Let ``weights_only`` loading read what mmengine's checkpoints hold besides tensors: log histories and arrays.

    Only these types are admitted, so ``--resume``, ``load_from``, ``test.py`` and ``get_model(pretrained=...)`` work
    while files with other code in them stay refused.
    """
    admitted = [HistoryBuffer, (_history_statistic, "builtins.getattr"), *_numpy_globals()]
    torch.serialization.add_safe_globals(admitted)
    if hasattr(mmengine.runner.checkpoint, "_safe_torch_load"):
        # onedl-mmengine admits the like for each load, getattr unrestricted among it, takes them back afterwards, ours
        # too, and loads with weights_only off what is refused all the same.
        mmengine.runner.checkpoint._safe_torch_load = torch.load


def _numpy_globals() -> list:
    """Functions and types that pickles of numpy's arrays and scalars name, without dtypes of objects or records.

    The same functions have other names in pickles of numpy 1 and of numpy 2, and both are admitted by both.
    """
    # By what numpy itself pickles: numpy 1.26 has a module numpy._core, too, with nothing in it.
    functions = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    names = [
        (function, f"numpy.{core}.multiarray.{name}")
        for name, function in functions.items()
        for core in ("core", "_core")
    ]
    dtypes = [dtype for name, dtype in vars(np.dtypes).items() if name.endswith("DType")]
    return [np.ndarray, np.dtype, *names, *(d for d in dtypes if d not in (np.dtypes.ObjectDType, np.dtypes.VoidDType))]


def read_checkpoint(path: str | Path, trust: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """Read a checkpoint from an untrusted file: tensors, and plain values beside them.

    Args:
        path: Checkpoint of mmengine, timm or torchvision, a pickled state dict, a ``.safetensors`` file, or the index
            of several (``.safetensors.index.json``).
        trust: Load other objects too, whole models among them. That can run any code that the file holds.

    Returns:
        The state dict, without the prefixes of DDP and ``torch.compile``, and the rest of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds other objects than tensors and plain values, or no state dict.
    """
    path = Path(path)
    require_file("checkpoint", path)
    content = _load(path, trust)
    key = next((key for key in _PLACES if key in content), None) if isinstance(content, Mapping) else None
    state_dict, rest = (content, {}) if key is None else (content[key], {k: v for k, v in content.items() if k != key})
    if isinstance(state_dict, nn.Module):
        state_dict = state_dict.state_dict()
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ValueError(f"checkpoint: {path} holds no state dict (found {type(state_dict).__name__})")
    others = [k for k, v in state_dict.items() if not (isinstance(v, torch.Tensor) or str(k).endswith(KEY))]
    if others:
        raise ValueError(f"checkpoint: the state dict of {path} holds more than tensors: {others[0]!r}, ...")
    for prefix in ("module.", "_orig_mod.", "module."):  # one may lie within the other, either way round
        if all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict, rest


def _load(path: Path, trust: bool) -> Any:
    """What a file holds, or one clear error."""
    try:
        if not path.name.endswith((".safetensors", ".safetensors.index.json")):
            return torch.load(path, map_location="cpu", weights_only=not trust)
        from safetensors.torch import load_file

        return {key: value for file in _shards(path) for key, value in load_file(file).items()}
    except ModuleNotFoundError as error:
        if error.name == "safetensors":
            error.msg = "safetensors is not installed; run: pip install safetensors"
            raise
        raise ValueError(f"checkpoint: {path} needs the module {error.name!r}, which is not installed") from error
    except Exception as error:
        # Torch says "Weights only load failed" for damaged pickles too; the part on globals is what tells them apart.
        refused = isinstance(error, pickle.UnpicklingError)
        if refused and ("global" in str(error).lower() or isinstance(error.__cause__, ValueError)):
            reason = next((x.strip() for x in str(error).splitlines() if "GLOBAL" in x or "global" in x), str(error))
            raise ValueError(
                f"checkpoint: {path} holds more than tensors and plain values, and loading that could run code; it was "
                f"not loaded. If you trust its source: --unsafe-load. ({reason[:200]})"
            ) from error
        raise ValueError(f"checkpoint: {path} is damaged, or no checkpoint ({describe(error, 200)})") from error


def _shards(path: Path) -> list[Path]:
    """The files of a ``.safetensors`` checkpoint: itself, or those that an index names, which lie beside it."""
    if path.suffix == ".safetensors":
        return [path]
    names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    return [path.with_name(Path(name).name) for name in names]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Block that writes ``path`` whole or not at all: ``path`` is the old file until the new one is safe on the disk.

    Yields the path to write to in its place, in the same folder; what is left there after a crash is overwritten by the
    next attempt. An exception leaves ``path`` as it was.
    """
    path = Path(os.path.realpath(path))  # through a link, which stays
    name = f".{path.stem}.partial{path.suffix}"
    partial = path.with_name(name if len(os.fsencode(name)) < 256 else f".partial{path.suffix}")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)  # the new name, too, outlives a power cut
    finally:
        partial.unlink(missing_ok=True)


def find_damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file, in a few words; None: it is whole, and its checksums are right.

    ``torch.load`` does not look at checksums: it loads flipped bits. Files of another format than torch's zip archives
    have none, and pass if they are not empty.
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
    except (OSError, zipfile.BadZipFile) as error:
        return describe(error, 200)
    return None if broken is None else f"the checksum of its record {broken!r} is wrong"


def latest_checkpoint(work_dir: str | Path, candidates: Iterable[Path]) -> tuple[str | None, list[str]]:
    """The checkpoint to resume from: the one that ``last_checkpoint`` names, else the newest that is whole.

    Args:
        work_dir: Where ``last_checkpoint`` lies.
        candidates: Checkpoints to fall back on.

    Returns:
        Its path, None if there is none; and what is wrong with the files that should have come first.
    """
    pointer = Path(work_dir, "last_checkpoint")
    candidates = sorted((path for path in candidates if path.is_file()), key=_age, reverse=True)
    problems = []
    if pointer.is_file():
        named = pointer.read_text(errors="replace").strip()
        if "://" in named or Path(named or "nowhere").is_dir():  # not ours to look into
            return named, []
        # The pointer of a work dir that was moved or copied names the old place.
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


def which_weights(state_dict: Mapping[str, torch.Tensor], rest: Mapping) -> str:
    """Which weights a checkpoint's state dict holds: ``EMAHook`` stores the average there, and the others beside it.

    Args:
        state_dict: That of the checkpoint.
        rest: What else the file holds, see :func:`read_checkpoint`.

    Returns:
        ``'averaged'``, ``'in training'``, or ``'unknown'`` for a bare state dict.
    """
    others = rest.get("ema_state_dict")
    if not isinstance(others, Mapping):
        return "in training" if rest.get("meta") else "unknown"
    # Until the average begins, both are the same.
    pairs = ((value, others.get(f"module.{key}")) for key, value in state_dict.items())
    same = all(other is None or torch.equal(value, other) for value, other in pairs)
    return "in training" if same else "averaged"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until the disk holds a file's bytes, or a folder's names, where the file system can tell."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs files open for writing only
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _age(path: Path) -> tuple[int, list[int]]:
    """Sort key: when the file was written, then the numbers in its name."""
    return path.stat().st_mtime_ns, [int(part) for part in re.findall(r"\d+", path.stem)]
