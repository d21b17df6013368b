"""Builds the parts of a config for every tool: its model and datasets. Every failure is an error of one line."""

from __future__ import annotations

from .installation import needs_mmengine  # noqa: F401

# isort: split
import copy
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from mmengine.config import Config
from mmengine.model import BaseTTAModel
from mmengine.registry import DATASETS, MODELS, DefaultScope, Registry
from torch import nn
from torch.utils.data import Dataset

from .checkpoint import read_checkpoint, which_weights
from .installation import config_path, is_installed
from .refused import Refused, describe
from .surgery.loading import load_trained

KEPT_META = ("epoch", "iter", "seed", "experiment_name")
_FOREIGN = ("Albumentations", "Albu")  # transforms with nested lists of parts that belong to other libraries
NO_SAMPLES = "its dataset holds no sample; check data_root, data_prefix, ann_file, split and indices"


def config_file(name: str | Path) -> str:
    """Path of a config.

    Args:
        name: A file, or ``'package::name'`` as in ``_base_``, such as ``'mmpretrain::resnet/...'``.

    Raises:
        FileNotFoundError: If there is no such file, package or config in the package.
        ValueError: If ``name`` is a folder.
    """
    package, found, inner = str(name).partition("::")
    if found:
        return _config_of_package(package, inner if inner.endswith(".py") else f"{inner}.py")
    path = Path(name)
    if path.is_dir():
        raise Refused(f"config: {path} is a folder", "name a config file in it")
    if not path.is_file():
        raise FileNotFoundError(f"config: there is no file {path}{_near(path.name, path.parent.glob('*.py'))}")
    return str(path)


def load_config(source: str | Path | Config, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config and apply options to it.

    Args:
        source: As for :func:`config_file`, or a ``Config``, which is changed in place.
        options: Changes by dotted keys, as for ``--cfg-options``.

    Raises:
        FileNotFoundError: As :func:`config_file`.
        ValueError: If the config cannot be read, or the options do not fit it; says why and what to do.
    """
    if not isinstance(source, Config):
        path = config_file(source)
        try:
            source = Config.fromfile(path)
        except Exception as error:
            raise Refused(f"config: {path} cannot be read ({describe(error)})", _advice(error)) from error
    try:
        source.merge_from_dict(dict(options or {}))
    except Exception as error:
        problem = f"--cfg-options: {' '.join(options)} does not fit the config ({describe(error)})"
        raise Refused(problem, "write KEY.SUB=VALUE, with numbers as the keys of list items") from error
    return source


def stack_pictures(config: Config) -> None:
    """Set mmpretrain's default ``collate_fn`` for the data loaders of ``config`` that have none, in place.

    mmpretrain's training tool does the same. mmengine's own default gives lists of images, which are copied to a GPU
    one by one, each time waiting for the copy.
    """
    for loader in filter(None, (config.get(f"{split}_dataloader") for split in ("train", "val", "test"))):
        loader.setdefault("collate_fn", {"type": "default_collate"})


def pick_device(name: str | torch.device | None) -> torch.device:
    """Device to compute on.

    Args:
        name: Such as ``'cpu'`` or ``'cuda:1'``; None: a GPU if there is one.

    Raises:
        ValueError: If the device is not available.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except Exception as error:
        raise Refused(f"device: {name!r} is not available ({describe(error)})", "leave it out, or use cpu") from error


def build_model(config: Config) -> nn.Module:
    """Build the model of a config, in eval mode, without initialising or loading its weights.

    Raises:
        ValueError: If the config has no model, it cannot be built, or it is one of test-time augmentation.
    """
    if not config.get("model"):
        raise Refused(f"config: {config.filename or 'it'} has no model", "inherit from a config that has one (_base_)")
    from .installation import needs_mmpretrain  # noqa: F401

    # isort: split
    import mmpretrain.models  # noqa: F401

    settings = copy.deepcopy(config.model)
    settings.setdefault("data_preprocessor", copy.deepcopy(config.get("data_preprocessor")))
    try:
        # mmpretrain's get_model fails for configs whose types are classes, not names.
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            model = MODELS.build(settings).eval()
    except Exception as error:
        problem = f"config: its model cannot be built ({describe(error)})"
        raise Refused(problem, "check the arguments of `model` in the config") from error
    if isinstance(model, BaseTTAModel):  # test.py --tta writes such a config into the work dir, over that of training
        problem = f"config: its model is {type(model).__name__}, which averages predictions for several images"
        raise Refused(problem, "name a config whose model is the network itself, as in training")
    return model


def load_model(config: Config, path: str | Path) -> tuple[nn.Module, dict]:
    """Build the model of a config and load a checkpoint.

    Args:
        config: Config of mmpretrain.
        path: Checkpoint, as for :func:`enc_plugin.checkpoint.read_checkpoint`.

    Returns:
        The model, and a dict with ``epoch``, ``iter``, ``seed`` and ``experiment_name``, as far as the checkpoint has
        them, and ``weights`` (see :func:`enc_plugin.checkpoint.which_weights`).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As :func:`enc_plugin.checkpoint.read_checkpoint`, and if the checkpoint does not fit the model.
    """
    state_dict, rest = read_checkpoint(path)
    model = build_model(config)
    try:
        load_trained(model, state_dict)
    except ValueError as error:
        text = str(error).removeprefix("checkpoint: ")
        raise ValueError(f"checkpoint: {path} with {config.filename}: {text}") from error
    meta = {key: value for key, value in dict(rest.get("meta") or {}).items() if key in KEPT_META}
    return model, meta | {"weights": which_weights(state_dict, rest)}


def build_dataset(config: Config, split: str) -> Dataset:
    """Build the dataset of ``<split>_dataloader``.

    Args:
        config: Config of mmpretrain.
        split: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        ValueError: If there is no such dataloader, its data is missing, or the dataset is empty.
    """
    key = f"{split}_dataloader"
    settings = (config.get(key) or {}).get("dataset")
    if settings is None:
        raise Refused(f"config: it has no {key} with a dataset", "set one, or inherit from a config with one (_base_)")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return make_dataset(key, settings)


def evaluation_split(config: Config) -> str:
    """``'test'`` if the config has a test dataloader, else ``'val'``; ``ValueError`` if it has neither."""
    split = next((split for split in ("test", "val") if config.get(f"{split}_dataloader")), None)
    if split is None:
        name = config.filename or "it"
        raise Refused(f"config: {name} has neither a test_dataloader nor a val_dataloader", "set one of them")
    return split


def make_dataset(key: str, settings: Mapping) -> Dataset:
    """Build a dataset in the current default scope.

    Args:
        key: Name of its dataloader for errors, such as ``'train_dataloader'``.
        settings: Config of the dataset.

    Raises:
        ValueError: If it cannot be built (its folder is missing, for example) or is empty.
    """
    try:
        dataset = DATASETS.build(settings)
        length = len(dataset) if hasattr(dataset, "__len__") else None
    except Exception as error:
        raise _dataset_error(key, settings, error) from error
    if length == 0:
        raise Refused(f"{key}: {NO_SAMPLES}")
    return dataset


def part_class(part: Mapping | str | Callable | None, registry: Registry) -> type | Callable | None:
    """Class (or function) that a part of a config names.

    A class is named alone, with a scope, with its module (``'mmengine.hooks.CheckpointHook'``, as in mmengine's copies
    of pure Python configs), or given itself. So configs are compared by what the registry finds, not by name.

    Args:
        part: Config with a ``type``, or the type alone.
        registry: Registry of such parts, such as ``HOOKS``; searched in the current scope.

    Returns:
        The class or function; None if there is no type, or the registry does not know it.
    """
    kind = part.get("type") if isinstance(part, Mapping) else part
    if not isinstance(kind, str):
        return kind
    try:
        with registry.switch_scope_and_registry(None) as scoped:
            return scoped.get(kind)
    except Exception:  # mmengine imports the module of a full name, which can raise anything
        return None


def named_parts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, name) of each registered part that occurs in a config."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            path = f"{key}.{name}" if key else str(name)
            if isinstance(value, str) and name in ("type", "constructor", "runner_type"):
                yield path, value
            elif str(node.get("type")).split(".")[-1] not in _FOREIGN:
                yield from named_parts(value, path)
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from named_parts(value, f"{key}.{i}")


def _dataset_error(key: str, settings: Mapping, error: Exception) -> Refused:
    if "need at least one array to concatenate" in str(error):  # mmengine cannot serialise an empty dataset
        return Refused(f"{key}: {NO_SAMPLES}")
    for place, root in _data_roots(settings, f"{key}.dataset"):
        if "://" not in root and not os.path.exists(root):
            own = f" ({error})" if root in str(error) and getattr(error, "errno", None) is None else ""
            return Refused(
                f"{place}.data_root = {root!r} does not exist (working directory: {os.getcwd()}){own}",
                f"put the data there, or pass --cfg-options {place}.data_root=PATH",
            )
    advice = f"check {key}.dataset: its paths and its pipeline"
    if isinstance(error, URLError):
        advice = f"it could not be downloaded: put the data where {key}.dataset looks for it, or check the network"
    return Refused(f"{key}: its dataset cannot be built ({describe(error)})", advice)


def _data_roots(settings: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, data_root) of a dataset and of its inner datasets."""
    if not isinstance(settings, Mapping):
        return
    if isinstance(settings.get("data_root"), str) and settings["data_root"]:
        yield key, settings["data_root"]
    yield from _data_roots(settings.get("dataset"), f"{key}.dataset")
    for number, inner in enumerate(settings.get("datasets") or ()):
        yield from _data_roots(inner, f"{key}.datasets.{number}")


def _config_of_package(package: str, name: str) -> str:
    if package == "enc_plugin":
        return config_path(name)
    if not is_installed(package):  # mmengine would try to install it
        raise FileNotFoundError(f"config: there is no installed package {package!r}, as in {package}::{name}")
    try:
        path, _ = Config._get_cfg_path(f"{package}::{name}", "")
    except Exception as error:
        raise FileNotFoundError(f"config: {package} has no config {name!r} ({describe(error)})") from error
    if not Path(path).is_file():
        near = _near(Path(name).name, Path(path).parent.glob("*.py"))
        raise FileNotFoundError(f"config: {package} has no config {name!r}{near}")
    return path


def _near(name: str, paths: Iterator[Path]) -> str:
    near = difflib.get_close_matches(name, sorted(path.name for path in paths), n=3)
    return f"; similar names: {', '.join(near)}" if near else ""


def _advice(error: Exception) -> str:
    """Advice for a config that cannot be read."""
    text = str(error)
    if "Duplicate key" in text:
        return "two files in `_base_` may not set the same key: keep it in one of them, or set it in the config itself"
    if "lazy_import" in text:
        return "`_base_` takes only configs without imports and read_base(), which can only be imported by read_base()"
    if isinstance(error, ImportError) or "import" in text.lower():
        return "install the modules of custom_imports, or run from the folder that holds them"
    if isinstance(error, FileNotFoundError):
        return "check the paths in `_base_` (relative to the config's own folder)"
    return "check the config's syntax and its `_base_`"
