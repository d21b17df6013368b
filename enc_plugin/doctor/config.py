"""Checks whether a config would train: its types, its data, its network, one batch, and a run up to its first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from mmengine.config import Config
from mmengine.registry import FUNCTIONS, init_default_scope
from mmpretrain.structures import DataSample
from torch import nn
from torch.utils._pytree import tree_leaves

from ..build import build_dataset, build_model, load_config, named_parts, part_class, pick_device
from ..engine.preflight import check_is_enc, check_metrics, find_labels, why_step_fails
from ..engine.rehearsal import rehearse
from ..refused import Refused, describe
from ..surgery.eligible import Evidence
from ..surgery.projected import constrained_layers
from ..table import first_few
from .finding import BROKEN, NOTE, OK, Finding, Result, examine, quietly, refusal
from .parts import check_custom_imports, check_types
from .weight_decay import examine_decay


@dataclass
class _Examined:
    """The config, and the objects that the checks have built from it so far."""

    cfg: Config
    device: torch.device
    samples: dict[str, list[dict]] = field(default_factory=dict)
    model: nn.Module | None = None
    train_samples: int | None = None

    @property
    def num_classes(self) -> int | None:
        head = (self.cfg.get("model") or {}).get("head")
        return head.get("num_classes") if isinstance(head, dict) else None


def check_config(config: str, options: dict | None = None, device: str | None = None) -> Iterator[Finding]:
    """Check a config in an environment that works; arguments as for :func:`enc_plugin.doctor.run`."""
    try:
        examined = _Examined(load_config(config, options), pick_device(device))
    except (Refused, FileNotFoundError) as error:
        yield refusal("config", error)
        return
    yield Finding("config", OK, str(config))
    init_default_scope(examined.cfg.get("default_scope") or "mmpretrain")  # None in pure Python configs
    broken: set[str] = set()
    for name, (check, needed) in _CHECKS.items():
        if broken & needed:
            continue
        for finding in examine(name, check, examined):
            if finding.state == BROKEN:
                broken.add(name)
            yield finding


def _data(examined: _Examined) -> Iterator[Result]:
    cfg, labels_fit = examined.cfg, True
    for split in ("train", "val", "test"):
        key = f"{split}_dataloader"
        settings = (cfg.get(key) or {}).get("dataset")
        if settings is None or (split == "test" and settings == (cfg.get("val_dataloader") or {}).get("dataset")):
            continue
        try:
            dataset = quietly(build_dataset, cfg, split)
        except Refused as error:
            yield BROKEN, f"{split}: {error.found}", error.advice
            continue
        try:
            examined.samples[split] = [quietly(dataset.__getitem__, i % len(dataset)) for i in range(2)]
        except Exception as error:
            yield BROKEN, f"{split}: {describe(error)}", f"check {key}: its paths and its pipeline"
            continue
        if split == "train":
            examined.train_samples = len(dataset)
        kind = getattr(settings["type"], "__name__", settings["type"])  # in pure Python configs, a class
        yield OK, f"{split}: {len(dataset):,} samples of {kind}, two were read"
        try:
            notes = find_labels(key, dataset, examined.num_classes)
        except Refused as error:
            if labels_fit:  # the other splits have the same classes
                yield BROKEN, error.found, error.advice
            labels_fit = False
            continue
        yield from ((NOTE, note) for note in notes)
    for name in ("val_evaluator", "test_evaluator"):
        metrics = cfg.get(name) or []
        check_metrics(name, [metrics] if isinstance(metrics, dict) else metrics, examined.num_classes)


def _model(examined: _Examined) -> Iterator[Result]:
    model = quietly(build_model, examined.cfg)
    quietly(model.init_weights)
    examined.model = model.to(examined.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    yield OK, f"{type(model).__name__}, {size:,} parameters"


def _enc(examined: _Examined) -> Iterator[Result]:
    model = examined.model
    check_is_enc(examined.cfg, model)
    layers = dict(constrained_layers(model))
    if not layers:
        yield NOTE, "a plain network", 'for ENC: model = dict(type="ENCImageClassifier")'
        return
    normed = [name for name, layer in layers.items() if layer.enc_norm is not None]
    variants = ", ".join(sorted({layer.enc_variant for layer in layers.values()}))
    text = f"{len(layers)} layers ({variants}); {len(normed)} with an added batch norm"
    yield OK, f"{text}: {first_few(normed, 4)}" if normed else text
    bare = [name for name in Evidence(model).without_norm({layers[name] for name in normed}) if name in layers]
    if bare:
        found = f"{len(bare)} layers have no norm after them: {first_few(bare, 4)}"
        yield NOTE, found, "enc=dict(post_norm=True) adds a batch norm to each of them"
    if not normed and "ENCImageClassifier" not in (name for _, name in named_parts(examined.cfg.model)):
        found = "the classifier is not ENC, because conv_cfg changes only convolutions"
        yield NOTE, found, 'model = dict(type="ENCImageClassifier") converts every layer'


def _forward(examined: _Examined) -> Iterator[Result]:
    model = examined.model
    torch.manual_seed(0)
    chosen = next(iter(examined.samples.values()), None)
    if chosen is None:
        size = _image_size(examined.cfg)
        image = torch.randint(256, (3, size, size), dtype=torch.uint8)
        chosen = [{"inputs": image, "data_samples": DataSample().set_gt_label(i)} for i in range(2)]
        source = f"two random images of {size} x {size} pixels"
    else:
        views = [str(tuple(view.shape)) for view in tree_leaves(chosen[0]["inputs"])]
        source = f"two samples of {' and '.join(views)}"
    batch = None
    try:
        batch = _collate_fn(examined.cfg)(chosen)
        processed = model.train().data_preprocessor(batch, training=True)
        losses = model(**processed, mode="loss")
        model.eval()(tree_leaves(processed["inputs"])[0])  # of several views, features are extracted from one
    except Exception as error:
        yield BROKEN, describe(error), why_step_fails(model, batch)
        return
    total = model.parse_losses(losses)[0].item()
    if not math.isfinite(total):
        yield BROKEN, f"{source}: the loss is {total}", "check the data_preprocessor's mean and std"
        return
    yield OK, f"{source}, on {examined.device}: loss {total:.4g}"


def _decay(examined: _Examined) -> Iterator[Result]:
    if examined.train_samples is not None and examined.cfg.get("train_cfg"):
        yield from examine_decay(examined.cfg, examined.train_samples)


def _run(examined: _Examined) -> Iterator[Result]:
    try:
        quietly(rehearse, examined.cfg)
    except Refused:
        raise
    except Exception as error:
        yield BROKEN, describe(error), "a run of this config ends with this error before its first step"
        return
    yield OK, "it runs up to its first step"


# Name -> check, and the checks that must have succeeded (otherwise it would only report the same problem again).
_CHECKS: dict[str, tuple[Callable[[_Examined], Iterable[Result]], set[str]]] = {
    "custom_imports": (lambda examined: check_custom_imports(examined.cfg), set()),
    "types": (lambda examined: check_types(examined.cfg), set()),
    "data": (_data, set()),
    "model": (_model, {"types"}),
    "ENC": (_enc, {"types", "model"}),
    "forward": (_forward, {"types", "model"}),
    "decay": (_decay, {"types", "data"}),
    "run": (_run, {"custom_imports", "types", "data", "model", "ENC", "forward"}),
}


def _collate_fn(cfg: Config) -> Callable[[list[dict]], dict]:
    """What makes a batch of samples in training; by default what mmpretrain's tools set."""
    settings = dict((cfg.get("train_dataloader") or {}).get("collate_fn") or {"type": "default_collate"})
    return partial(part_class(settings.pop("type"), FUNCTIONS), **settings)


def _image_size(cfg: Config) -> int:
    """Image size after the test pipeline, in pixels; 224 if the pipeline does not say."""
    loader = cfg.get("val_dataloader") or cfg.get("test_dataloader") or cfg.get("train_dataloader") or {}
    for step in reversed((loader.get("dataset") or {}).get("pipeline") or []):
        size = step.get("crop_size", step.get("scale"))
        if size is not None:
            return int(size[0] if isinstance(size, (tuple, list)) else size)
    return 224
