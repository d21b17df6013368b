"""Reads checkpoints safely, with ``torch.load(weights_only=True)``, the default since torch 2.6."""

from __future__ import annotations

from .installation import needs_mmengine  # noqa: F401

# isort: split
import functools
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from .layers.origin import KEY, CheckpointWarning
from .refused import describe, require_file
from .surgery.loading import refuse_enc_in_plain

_STATISTICS = ("min", "max", "mean", "current")
# Keys of the state dict within a file: of mmengine and timm, of torchvision, and of averages by timm and torchvision.
_AVERAGES = ("state_dict_ema", "model_ema")
_PLACES = ("state_dict", "model", *_AVERAGES)


def _history_statistic(owner: type, name: str):
    """Stand-in for ``getattr`` in checkpoints, where HistoryBuffer pickles its own statistics by name."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(owner, name)
    raise ValueError(
        f"checkpoint: it refers to attribute {name!r} of {owner!r}, which no mmengine checkpoint needs; "
        "load it only if you trust its source, with torch.load(..., weights_only=False)"
    )


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read the log histories and NumPy arrays in mmengine's checkpoints.

    Then ``--resume``, ``load_from``, ``test.py`` and ``get_model(pretrained=...)`` work, while files with any other
    code are still refused.
    """
    admitted = [HistoryBuffer, (_history_statistic, "builtins.getattr"), *_numpy_globals()]
    torch.serialization.add_safe_globals(admitted)
    if hasattr(mmengine.runner.checkpoint, "_safe_torch_load"):
        # onedl-mmengine temporarily allows similar types (including plain getattr), removes ours afterwards, and
        # retries refused files with weights_only=False. So we replace its loader.
        mmengine.runner.checkpoint._safe_torch_load = torch.load


def check_what_mmengine_loads() -> None:
    """Let mmengine's ``load_state_dict`` raise if layers that are ENC in a checkpoint are plain in the network.

    It only logs keys that do not match, and the network would compute with the free weights. All of OpenMMLab loads by
    this function: ``load_from``, ``init_cfg=dict(type='Pretrained')``, ``get_model(pretrained=...)``, the tools.
    """
    load = mmengine.runner.checkpoint.load_state_dict

    @functools.wraps(load)
    def load_state_dict(module: nn.Module, state_dict: Mapping, *args, **kwargs) -> None:
        refuse_enc_in_plain(module, state_dict)
        load(module, state_dict, *args, **kwargs)

    mmengine.runner.checkpoint.load_state_dict = load_state_dict


def _numpy_globals() -> list:
    """Functions and types in pickles of NumPy arrays and scalars, without dtypes of objects and records.

    NumPy 1 and NumPy 2 pickle the same functions under different names. Both names are allowed under both versions.
    """
    # Take the functions from pickles: the module numpy._core of NumPy 1.26 does not contain them.
    functions = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    names = [
        (function, f"numpy.{core}.multiarray.{name}")
        for name, function in functions.items()
        for core in ("core", "_core")
    ]
    dtypes = [dtype for name, dtype in vars(np.dtypes).items() if name.endswith("DType")]
    return [np.ndarray, np.dtype, *names, *(d for d in dtypes if d not in (np.dtypes.ObjectDType, np.dtypes.VoidDType))]


def read_checkpoint(path: str | Path, trust: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """Read a checkpoint from an untrusted file.

    Args:
        path: Checkpoint of mmengine, timm or torchvision, a pickled state dict, a ``.safetensors`` file, or the index
            of several (``.safetensors.index.json``).
        trust: Load arbitrary objects too, such as whole models. This can run any code that the file contains.

    Returns:
        The state dict, without the prefixes of DDP and ``torch.compile``, and the other entries of the file. If timm or
        torchvision saved the weights in training and an average of them, it is the former, with a warning.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, contains objects other than tensors and plain values, or has no state dict.
    """
    path = Path(path)
    require_file("checkpoint", path)
    content = _load(path, trust)
    key = next((key for key in _PLACES if key in content), None) if isinstance(content, Mapping) else None
    state_dict, rest = (content, {}) if key is None else (content[key], {k: v for k, v in content.items() if k != key})
    average = next((place for place in _AVERAGES if place in rest), None)
    if average is not None:
        warnings.warn(
            f"checkpoint: {path} holds weights in training ({key!r}), which are used, and an average of them "
            f"({average!r}); to use the average, save that entry as a file of its own",
            CheckpointWarning,
            stacklevel=2,
        )
    if isinstance(state_dict, nn.Module):
        state_dict = state_dict.state_dict()
    if not isinstance(state_dict, Mapping) or not state_dict or not all(isinstance(key, str) for key in state_dict):
        raise ValueError(f"checkpoint: {path} holds no state dict (found {type(state_dict).__name__})")
    others = [k for k, v in state_dict.items() if not (isinstance(v, torch.Tensor) or k.endswith(KEY))]
    if others:
        raise ValueError(f"checkpoint: the state dict of {path} holds more than tensors: {others[0]!r}, ...")
    for prefix in ("module.", "_orig_mod.", "module."):  # DDP and torch.compile can be nested in either order
        if all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict, rest


def _load(path: Path, trust: bool) -> Any:
    """Content of a file; ``ValueError`` if it cannot be loaded."""
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
        # torch says "Weights only load failed" for damaged pickles too; only refused ones mention a global.
        refused = isinstance(error, pickle.UnpicklingError)
        if refused and ("global" in str(error).lower() or isinstance(error.__cause__, ValueError)):
            reason = next((x.strip() for x in str(error).splitlines() if "GLOBAL" in x or "global" in x), str(error))
            raise ValueError(
                f"checkpoint: {path} holds more than tensors and plain values, and loading that could run code; it was "
                f"not loaded. If you trust its source: --unsafe-load. ({reason[:200]})"
            ) from error
        raise ValueError(f"checkpoint: {path} is damaged, or no checkpoint ({describe(error, 200)})") from error


def _shards(path: Path) -> list[Path]:
    """Files of a ``.safetensors`` checkpoint: ``path`` itself, or the files beside it that an index lists."""
    if path.suffix == ".safetensors":
        return [path]
    names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    return [path.with_name(Path(name).name) for name in names]


def which_weights(state_dict: Mapping[str, torch.Tensor], rest: Mapping) -> str:
    """Whether a state dict holds averaged weights (as ``EMAHook`` saves them) or the weights in training.

    Args:
        state_dict: State dict of the checkpoint.
        rest: Other entries of the file, as :func:`read_checkpoint` returns them.

    Returns:
        ``'averaged'``, ``'in training'``, or ``'unknown'`` for a bare state dict and for an average of other keys.
    """
    others = rest.get("ema_state_dict")
    if not isinstance(others, Mapping):
        return "in training" if rest.get("meta") or any(place in rest for place in _AVERAGES) else "unknown"
    # Until averaging begins, both are equal.
    pairs = [(value, others[name]) for key, value in state_dict.items() if (name := f"module.{key}") in others]
    if not pairs:
        return "unknown"
    return "in training" if all(torch.equal(*pair) for pair in pairs) else "averaged"
