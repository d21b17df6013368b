"""Measure parameters and GFLOPs of the configs' networks; write them to the READMEs and the metafile of configs/."""

from __future__ import annotations

from enc_plugin.installation import needs_mmpretrain  # noqa: F401

# isort: split
import argparse
import functools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from mmengine.analysis import get_model_complexity_info
from torch import nn

from enc_plugin.build import build_model, load_config
from enc_plugin.convert import enc_layers, fold
from lab import ROOT

PAPER = {"Title": "Generalization Bound Regularizer: A Unified Perspective for Understanding Weight Decay"}


@dataclass(frozen=True)
class Complexity:
    """Size of one network: parameters, and multiply-adds for one image as counted by mmengine."""

    params: int
    flops: int


def complexity(model: nn.Module) -> Complexity:
    """Size of ``model`` for an image of 224 x 224 pixels."""
    model.eval()
    image = torch.zeros(1, 3, 224, 224)
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # mmengine warns of each operator and module that it does not count
    try:
        counts = get_model_complexity_info(model, inputs=image, show_table=False, show_arch=False)
    finally:
        logging.disable(previous)
    return Complexity(int(counts["params"]), int(counts["flops"]))


_measured: dict[str, tuple[Complexity, Complexity]] = {}  # by network


@functools.cache
def complexities(path: Path) -> tuple[Complexity, Complexity]:
    """Complexity of the network that the config at ``path`` builds, and of the plain network after folding."""
    config = load_config(path)
    # Configs with the same network may differ in loss and augmentation.
    network = {key: value for key, value in config.model.to_dict().items() if key != "train_cfg"}
    network["head"] = {key: value for key, value in network.get("head", {}).items() if key != "loss"}
    key = json.dumps(network, sort_keys=True, default=str)
    if key not in _measured:
        model = build_model(config).eval()
        trained = complexity(model)
        folded = complexity(fold(model)) if next(enc_layers(model), None) is not None else trained
        _measured[key] = trained, folded
    return _measured[key]


COLUMNS = {
    "params (M)": lambda trained, folded: f"{trained.params / 1e6:.2f}",
    "GFLOPs": lambda trained, folded: f"{trained.flops / 1e9:.3f}",
    "params, folded (M)": lambda trained, folded: f"{folded.params / 1e6:.2f}",
    "GFLOPs, folded": lambda trained, folded: f"{folded.flops / 1e9:.3f}",
}


def fill_tables(text: str, folder: Path) -> str:
    """Fill the measured columns (:data:`COLUMNS`) of all Markdown tables in ``text``.

    Args:
        text: A README. Its tables need a column ``config`` with links to config files.
        folder: Folder that the links are relative to.

    Returns:
        The text with these cells replaced.
    """
    head: list[str] = []
    lines = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            head = []
        elif not head:
            head = cells
        elif "config" in head and (link := re.search(r"\((\S+\.py)\)", cells[head.index("config")])):
            sizes = complexities((folder / link[1]).resolve())
            for column in set(head) & set(COLUMNS):
                cells[head.index(column)] = COLUMNS[column](*sizes)
            line = f"| {' | '.join(cells)} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def imagenet_configs(configs: Path) -> Iterator[Path]:
    """The ImageNet configs below ``configs``, those of Table 4 first; of configs with the same name, only the first."""
    seen = set()
    for path in [*sorted(configs.glob("*.py")), *sorted(configs.glob("[tf]*/*.py"))]:
        if path.stem not in seen:
            seen.add(path.stem)
            yield path


def metafile(configs: Path) -> str:
    """Text of ``configs/metafile.yml``, from which mmpretrain's model list and MIM read the configs.

    Args:
        configs: The folder of the configs.

    Returns:
        YAML, without results, because there are no trained weights. The paper's results are in the READMEs.
    """
    collection = {
        "Name": "ENC",
        "Metadata": {
            "Training Data": "ImageNet-1k",
            "Training Techniques": ["SGD with Momentum", "Weight Decay", "Equivalent Norm Constraint"],
            "Epochs": 100,
            "Batch Size": 256,
        },
        "Paper": PAPER,
        "README": "configs/README.md",
    }
    models = []
    for path in imagenet_configs(configs):
        _, folded = complexities(path.resolve())
        models.append(
            {
                "Name": path.stem,
                "Metadata": {"FLOPs": folded.flops, "Parameters": folded.params},
                "In Collection": "ENC",
                "Results": [{"Task": "Image Classification", "Dataset": "ImageNet-1k", "Metrics": {}}],
                "Config": f"configs/{path.relative_to(configs).as_posix()}",
            }
        )
    comment = "# Written by python -m lab.zoo: sizes are measured from the built models, folded.\n"
    return comment + yaml.safe_dump({"Collections": [collection], "Models": models}, sort_keys=False, width=120)


def update(configs: Path, write: bool = True) -> list[Path]:
    """Update the READMEs and the metafile below ``configs``.

    Args:
        configs: The folder of the configs.
        write: Whether to write the files, or only find those that are out of date.

    Returns:
        The files that were out of date.
    """
    texts = {path: fill_tables(path.read_text(), path.parent) for path in configs.rglob("README.md")}
    texts[configs / "metafile.yml"] = metafile(configs)
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in changed if write else ():
        path.write_text(texts[path])
    return changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lab.zoo", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    check = parser.parse_args().check
    found = update(ROOT / "configs", write=not check)
    for file in found:
        print(f"{'out of date' if check else 'written'}: {file}")
    raise SystemExit(bool(found) and check)
