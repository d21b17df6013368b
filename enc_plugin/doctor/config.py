"""Whether a config would train: its parts, its data, its network, one batch, and a rehearsal up to the first step."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field

import mmengine.registry
import mmpretrain.registry
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import Registry, init_default_scope
from mmpretrain.structures import DataSample
from torch import nn

from ..build import build_dataset, build_model, load_config, named_parts, pick_device
from ..engine.preflight import check_is_enc, check_metrics, find_labels, why_step_fails
from ..engine.rehearsal import rehearse
from ..refused import Refused, describe
from ..surgery.eligible import Evidence
from ..surgery.projected import constrained_layers
from .finding import BROKEN, NOTE, OK, Finding, examine, quietly, refusal
from .weight_decay import examine_decay


@dataclass
class _Examined:
    """The config, and what the checks so far have built of it."""

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
    """Findings on a config, in an environment that works; arguments as for :func:`enc_plugin.doctor.run`."""
    try:
        examined = _Examined(load_config(config, options), pick_device(device))
    except (Refused, FileNotFoundError) as error:
        yield refusal("config", error)
        return
    yield Finding("config", OK, str(config))
    init_default_scope(examined.cfg.get("default_scope", "mmpretrain"))
    broken: set[str] = set()
    for name, check, needed in _CHECKS:
        if broken & needed:
            continue
        for finding in examine(name, check, examined):
            if finding.state == BROKEN:
                broken.add(name)
            yield finding


def _custom_imports(examined: _Examined) -> Iterator[Finding]:
    imports = (examined.cfg.get("custom_imports") or {}).get("imports", [])
    imports = [imports] if isinstance(imports, str) else imports
    own = {
        name
        for registry in _registries()
        for name, part in registry.module_dict.items()
        if getattr(part, "__module__", "").split(".")[0] == "enc_plugin"
    }
    used = sorted({name for _, name in named_parts(examined.cfg.to_dict()) if name.split(".")[-1] in own})
    if not used:
        yield Finding("custom_imports", NOTE, "this config uses no part of the plugin", "see the README: Use it")
    elif not any(name.split(".")[0] == "enc_plugin" for name in imports):
        found = f"the config names {', '.join(used)} and does not import the plugin: 'not in the registry' elsewhere"
        yield Finding("custom_imports", BROKEN, found, 'add: custom_imports = dict(imports=["enc_plugin"])')
    else:
        yield Finding("custom_imports", OK, f"the plugin, for {', '.join(used)}")


def _types(examined: _Examined) -> Iterator[Finding]:
    for registry in _registries():
        quietly(registry.import_from_location)
    known = {name for registry in _registries() for name in registry.module_dict}
    for key, name in named_parts(examined.cfg.to_dict()):
        if name.split(".")[-1] not in known:
            near = difflib.get_close_matches(name, known, n=3)
            advice = f"did you mean {' or '.join(near)}?" if near else "name the package that has it in custom_imports"
            yield Finding("types", BROKEN, f"{key} = {name!r} is not in any registry", advice)


def _data(examined: _Examined) -> Iterator[Finding]:
    cfg, labels_fit = examined.cfg, True
    for split in ("train", "val", "test"):
        key = f"{split}_dataloader"
        settings = (cfg.get(key) or {}).get("dataset")
        if settings is None or (split == "test" and settings == (cfg.get("val_dataloader") or {}).get("dataset")):
            continue
        try:
            dataset = quietly(build_dataset, cfg, split)
        except Refused as error:
            yield Finding("data", BROKEN, f"{split}: {error.found}", error.advice)
            continue
        try:
            examined.samples[split] = [quietly(dataset.__getitem__, i % len(dataset)) for i in range(2)]
        except Exception as error:
            yield Finding("data", BROKEN, f"{split}: {describe(error)}", f"check {key}: its paths and its pipeline")
            continue
        if split == "train":
            examined.train_samples = len(dataset)
        yield Finding("data", OK, f"{split}: {len(dataset):,} samples of {settings['type']}, two were read")
        try:
            notes = find_labels(key, dataset, examined.num_classes)
        except Refused as error:
            if labels_fit:  # the other splits have the same classes
                yield refusal("data", error)
            labels_fit = False
            continue
        yield from (Finding("data", NOTE, note) for note in notes)
    for name in ("val_evaluator", "test_evaluator"):
        metrics = cfg.get(name) or []
        check_metrics(name, [metrics] if isinstance(metrics, dict) else metrics, examined.num_classes)


def _model(examined: _Examined) -> Iterator[Finding]:
    model = quietly(build_model, examined.cfg)
    quietly(model.init_weights)
    examined.model = model.to(examined.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    yield Finding("model", OK, f"{type(model).__name__}, {size:,} parameters")


def _enc(examined: _Examined) -> Iterator[Finding]:
    model = examined.model
    check_is_enc(examined.cfg, model)
    layers = dict(constrained_layers(model))
    if not layers:
        yield Finding("ENC", NOTE, "a plain network", 'for ENC: model = dict(type="ENCImageClassifier")')
        return
    normed = [name for name, layer in layers.items() if layer.enc_norm is not None]
    kinds = ", ".join(sorted({layer.enc_variant for layer in layers.values()}))
    text = f"{len(layers)} layers ({kinds}); {len(normed)} with a batch norm of their own"
    yield Finding("ENC", OK, f"{text}: {_first(normed)}" if normed else text)
    bare = [name for name in Evidence(model).without_norm({layers[name] for name in normed}) if name in layers]
    if bare:
        found = f"{len(bare)} layers have no norm behind them: {_first(bare)}"
        yield Finding("ENC", NOTE, found, "enc=dict(post_norm=True) gives each of them a batch norm of its own")
    if not normed and "ENCImageClassifier" not in (name for _, name in named_parts(examined.cfg.model)):
        found = "the classifier is not ENC: conv_cfg reaches convolutions alone"
        yield Finding("ENC", NOTE, found, 'model = dict(type="ENCImageClassifier") reaches every layer')


def _forward(examined: _Examined) -> Iterator[Finding]:
    model = examined.model
    torch.manual_seed(0)
    chosen = next(iter(examined.samples.values()), None)
    if chosen is None:
        size = _image_size(examined.cfg)
        image = torch.randint(256, (3, size, size), dtype=torch.uint8)
        chosen = [{"inputs": image, "data_samples": DataSample().set_gt_label(i)} for i in range(2)]
        source = f"two made-up images of {size} x {size} pixels"
    else:
        source = f"two samples of {tuple(chosen[0]['inputs'].shape)}"
    try:
        batch = model.train().data_preprocessor(pseudo_collate(chosen), training=True)
        losses = model(**batch, mode="loss")
        model.eval()(batch["inputs"])
    except Exception as error:
        yield Finding("forward", BROKEN, describe(error), why_step_fails(model, batch["inputs"]))
        return
    total = sum(value.sum().item() for key, value in losses.items() if "loss" in key)
    if total != total or abs(total) == float("inf"):
        yield Finding("forward", BROKEN, f"{source}: the loss is {total}", "check the data_preprocessor's mean and std")
        return
    yield Finding("forward", OK, f"{source}, on {examined.device}: loss {total:.4g}")


def _decay(examined: _Examined) -> Iterator[Finding]:
    if examined.train_samples is not None and examined.cfg.get("train_cfg"):
        yield from examine_decay(examined.cfg, examined.train_samples)


def _run(examined: _Examined) -> Iterator[Finding]:
    try:
        quietly(rehearse, examined.cfg)
    except Refused:
        raise
    except Exception as error:
        yield Finding("run", BROKEN, describe(error), "a run of this config ends so before its first step")
        return
    yield Finding("run", OK, "rehearsed up to its first step")


_CHECKS = (
    # Name, check, and the checks without whose success it would only repeat what they found.
    ("custom_imports", _custom_imports, set()),
    ("types", _types, set()),
    ("data", _data, set()),
    ("model", _model, {"types"}),
    ("ENC", _enc, {"types", "model"}),
    ("forward", _forward, {"types", "model"}),
    ("decay", _decay, {"types", "data"}),
    ("run", _run, {"custom_imports", "types", "data", "model", "ENC", "forward"}),
)


def _first(names: list[str]) -> str:
    return ", ".join(names[:4]) + ", ..." * (len(names) > 4)


def _image_size(cfg: Config) -> int:
    """Pixels that the test pipeline delivers; 224 if it does not say."""
    loader = cfg.get("val_dataloader") or cfg.get("test_dataloader") or cfg.get("train_dataloader") or {}
    for step in reversed((loader.get("dataset") or {}).get("pipeline") or []):
        size = step.get("crop_size", step.get("scale"))
        if size is not None:
            return int(size[0] if isinstance(size, (tuple, list)) else size)
    return 224


def _registries() -> Iterator[Registry]:
    seen = set()
    roots = [*vars(mmengine.registry).values(), *vars(mmpretrain.registry).values()]
    while roots:
        registry = roots.pop()
        if isinstance(registry, Registry) and id(registry) not in seen:
            seen.add(id(registry))
            roots.extend(registry.children.values())
            yield registry
