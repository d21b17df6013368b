"""Converts a trained ENC checkpoint to a checkpoint of the stock model, and checks the result on real samples."""

from __future__ import annotations

from .installation import needs_mmpretrain  # noqa: F401

# isort: split
import copy
import datetime
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .build import KEPT_META, build_dataset, build_model, evaluation_split, load_config, part_class, pick_device
from .checkpoint import read_checkpoint
from .checkpoint_files import file_sha256, replacing
from .functional.checks import check_integer, check_number
from .functional.precision import full_float32
from .layers import ENC_LAYERS, enc_layers
from .layers.origin import saved_settings
from .measuring.spread import spread
from .models import ENCImageClassifier, GBRImageClassifier
from .refused import describe, require_file
from .surgery.eligible import refuse_weights_read_elsewhere
from .surgery.fold import fold
from .surgery.loading import load_trained
from .surgery.recording import RecordError, record_forward
from .version import __version__

_ENC_OPTIONS = ("variant", "alpha", "post_norm")


@dataclass(frozen=True)
class FoldReport:
    """Result of :func:`fold_checkpoint`.

    Attributes:
        out: The file that was written.
        layers: Number of ENC layers that were folded.
        settings: Their variants and alphas, such as ``'ws, alpha 1'``.
        samples: Number of real samples on which the outputs were compared.
        error: Largest relative difference of a sample's outputs, ``||stock - ENC|| / ||ENC||``.
        source: File name of the checkpoint that was folded.
        source_sha256: SHA-256 of that file.
    """

    out: str
    layers: int
    settings: list[str]
    samples: int
    error: float
    source: str
    source_sha256: str

    def __str__(self) -> str:
        return (
            f"folded {self.layers} ENC layers ({'; '.join(self.settings)}); outputs differ by {self.error:.1e} "
            f"(relative) on {self.samples} samples; wrote {self.out}"
        )


def fold_checkpoint(
    config: str | Path | Config,
    checkpoint: str | Path,
    out: str | Path,
    safetensors: bool = False,
    images: Sequence[str] | None = None,
    num_samples: int = 8,
    tolerance: float = 1e-5,
    trust: bool = False,
    device: str | None = None,
) -> FoldReport:
    """Fold a checkpoint of an ENC config into one of the stock config.

    Before the file is written, the stock model loads the folded weights strictly, and its outputs on real samples are
    compared with those of the ENC model. If a check fails, nothing is written.

    Args:
        config: Config with which the checkpoint was trained.
        checkpoint: As for :func:`enc_plugin.checkpoint.read_checkpoint`.
        out: File to write; an existing one is replaced.
        safetensors: Write safetensors (``out`` ends in ``.safetensors``) instead of an mmengine checkpoint.
        images: Image files for the check; None or empty: samples of the config's test (else validation) dataset.
        num_samples: Number of samples of the dataset, evenly spaced.
        tolerance: Largest relative difference of the outputs that is accepted.
        trust: Load arbitrary objects from the checkpoint, which can run any code that it contains.
        device: Device for the check, such as ``'cpu'`` or ``'cuda:1'``; None: a GPU if there is one.

    Returns:
        The report, which is also stored in the file (``meta['enc_fold']``, or the metadata of safetensors).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the checkpoint is damaged, contains code, is of a plain network or of other ENC settings, does
            not fit the config, or the outputs differ.
    """
    check_integer("num_samples", num_samples, 1)
    check_number("tolerance", tolerance, "a number >= 0", lambda value: value >= 0)
    out, checkpoint = Path(out), Path(checkpoint)
    if safetensors != (out.suffix == ".safetensors"):
        raise ValueError(f"out: expected a name in .safetensors with --safetensors, and only then, got {out.name!r}")
    if out.is_dir() or (out.exists() and checkpoint.exists() and out.samefile(checkpoint)):
        raise ValueError(f"out: {out} is {'a folder' if out.is_dir() else 'the checkpoint itself'}; name another file")
    device, config = pick_device(device), load_config(config)

    state_dict, rest = read_checkpoint(checkpoint, trust)
    model = build_model(config)
    _load_enc(model, state_dict)
    stock_cfg = stock_config(config)
    stock = build_model(stock_cfg)
    folded = fold(model).state_dict()
    _load_stock(stock, folded)

    batch = pseudo_collate(_samples(config, images, num_samples))
    for network in (model, stock):
        network.to(device)
    _check_readers(model, batch)
    error = _output_error(model, stock, batch)
    if not error <= tolerance:
        raise ValueError(
            f"the folded network's outputs differ by {error:.1e} (relative) from the ENC network's, more than "
            f"the tolerance of {tolerance:.0e}; {_explain_error(model, batch)}; nothing was written"
        )

    layers = [layer for _, layer in enc_layers(model)]
    kinds = {f"{layer.enc_variant}, alpha {layer.enc_settings['alpha']}" for layer in layers}
    digest = file_sha256(checkpoint)
    report = FoldReport(str(out), len(layers), sorted(kinds), len(batch["inputs"]), error, checkpoint.name, digest)
    _write(out, folded, _meta(rest, stock_cfg, report), safetensors)
    return report


def stock_config(config: Config) -> Config:
    """Copy of ``config`` whose ``model`` is the stock model without ENC."""
    config = copy.deepcopy(config)
    config.model = _to_stock(config.model.to_dict())
    return config


def _to_stock(node: Any) -> Any:
    if isinstance(node, (list, tuple)):
        return type(node)(_to_stock(item) for item in node)
    if not isinstance(node, dict):
        return node
    node = {key: _to_stock(value) for key, value in node.items()}
    kind = part_class(node, MODELS)
    plain = {cls: stock.__name__ for stock, cls in ENC_LAYERS.items()}
    if kind in plain:
        node = {key: value for key, value in node.items() if key not in _ENC_OPTIONS} | {"type": plain[kind]}
    elif kind in (ENCImageClassifier, GBRImageClassifier):
        own = ("enc", "gbr_penalty")
        node = {key: value for key, value in node.items() if key not in own} | {"type": "ImageClassifier"}
    elif str(node.get("model_name", "")).startswith("enc_"):  # a model of enc_plugin.timm
        node = {k: v for k, v in node.items() if k != "enc"} | {"model_name": node["model_name"].removeprefix("enc_")}
    return node


def _load_enc(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load an ENC checkpoint, strictly and only if its ENC settings are those of the model."""
    if next(enc_layers(model), None) is None:
        raise ValueError("config: its model has no ENC layers, so there is nothing to fold")
    if not saved_settings(state_dict):
        raise ValueError(
            "checkpoint: it is of a plain network, not of an ENC one, so there is nothing to fold (an ENC checkpoint "
            "has an entry '_extra_state' for each ENC layer; if these were removed, use the checkpoint as it was saved)"
        )
    load_trained(model, state_dict)


def _load_stock(stock: nn.Module, folded: dict[str, Tensor]) -> None:
    try:
        stock.load_state_dict(folded, strict=True)
    except RuntimeError as error:
        raise ValueError(
            "the folded weights do not load into the stock model: a layer without a bias had an added batch norm "
            f"(post_norm=True), or stock_config cannot undo how the config builds ENC layers: {describe(error)}"
        ) from error


def _samples(config: Config, images: Sequence[str] | None, num_samples: int) -> list[dict]:
    """Real samples from the test pipeline, each ``dict(inputs=..., data_samples=...)``."""
    split = evaluation_split(config)
    settings = config[f"{split}_dataloader"].dataset
    if images:
        pipeline = list(settings.pipeline)
        if not any("LoadImage" in str(step.get("type")) for step in pipeline):
            pipeline.insert(0, {"type": "LoadImageFromFile"})
        for image in images:
            require_file("images", image)
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            return [Compose(pipeline)({"img_path": str(image)}) for image in images]
    try:
        dataset = build_dataset(config, split)
    except ValueError as error:
        raise ValueError(
            f"the check needs real samples, and the config's dataset ({settings.get('type')}) cannot be read "
            f"({describe(error)}); pass some image files: --images FILE ..."
        ) from error
    return [dataset[i] for i in spread(len(dataset), num_samples)]


def _check_readers(model: nn.Module, batch: dict) -> None:
    """Raise ``ValueError`` if the network computes with the free weight of an ENC layer outside of that layer."""
    inputs = model.data_preprocessor(copy.deepcopy(batch), training=False)["inputs"]
    with suppress(RecordError):
        refuse_weights_read_elsewhere(model, record_forward(model, (inputs,)))


@torch.no_grad()
@full_float32()
def _output_error(model: nn.Module, stock: nn.Module, batch: dict) -> float:
    """Maximum of ``||stock - ENC|| / ||ENC||`` over the samples; Inf if an output is not finite."""
    outputs = []
    for network in (model.eval(), stock.eval()):
        inputs = network.data_preprocessor(copy.deepcopy(batch), training=False)["inputs"]
        inputs = inputs.to(next(network.parameters()).dtype)
        tensors = [t for t in tree_leaves(network(inputs, mode="tensor")) if isinstance(t, Tensor)]
        outputs.append(torch.cat([t.flatten(1).double() for t in tensors], dim=1))
    error = ((outputs[1] - outputs[0]).norm(dim=1) / outputs[0].norm(dim=1)).max().item()
    return error if torch.stack(outputs).isfinite().all() else float("inf")


def _explain_error(model: nn.Module, batch: dict) -> str:
    """Whether rounding or a wrong fold makes the outputs differ, determined in float64."""
    exact = copy.deepcopy(model).double()
    error = _output_error(exact, fold(exact), batch)
    if error < 1e-9:
        return (
            f"in float64 they differ by {error:.0e}, so the fold is right and the network amplifies rounding; use a "
            "larger tolerance to accept that"
        )
    return f"in float64 they differ by {error:.0e}, so the fold is wrong"


def _meta(rest: dict, stock_cfg: Config, report: FoldReport) -> dict:
    """Entry ``meta`` of the file: parts of the checkpoint's own, the stock config and the report."""
    kept = (*KEPT_META, "dataset_meta", "mmengine_version")
    meta = {key: value for key, value in dict(rest.get("meta") or {}).items() if key in kept}
    fold_meta = {
        "out": Path(report.out).name,
        "enc_plugin": __version__,
        "torch": str(torch.__version__),  # without str(), safe loading refuses its class
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return meta | {"cfg": stock_cfg.pretty_text, "enc_fold": asdict(report) | fold_meta}


def _write(out: Path, state_dict: dict[str, Tensor], meta: dict, safetensors: bool) -> None:
    """Write ``out``, and read it back before it replaces an older file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        if safetensors:
            from safetensors.torch import save_file

            tensors = {key: value.contiguous().clone() for key, value in state_dict.items()}
            save_file(tensors, partial, metadata={"format": "pt", "meta": json.dumps(meta, default=str)})
        else:
            torch.save({"meta": meta, "state_dict": state_dict}, partial)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # the usual mode of a new file; safetensors makes it private
        written, _ = read_checkpoint(partial)
        if written.keys() != state_dict.keys() or not all(torch.equal(written[k], v) for k, v in state_dict.items()):
            raise ValueError(f"out: {out} did not read back as written; is the disk full?")
