"""What a study measures of a trained network: losses, margins, robustness, norms and the bounds that follow."""

from __future__ import annotations

import math

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from enc_plugin.convert import audit
from enc_plugin.functional import map_spectral_norm, residual_log_bound
from enc_plugin.measuring.pipelines import find_pipeline
from enc_plugin.measuring.pixels import PixelClassifier, collate_pixels
from enc_plugin.measuring.robustness import measure_robustness
from enc_plugin.measuring.spread import spread
from enc_plugin.measuring.untouched import untouched
from enc_plugin.surgery.folded import FoldedAudit
from enc_plugin.surgery.recording import record_forward

_GAP_SAMPLES = 5000
_BATCH_SIZE, _ATTACKED_AT_A_TIME = 250, 64


def measure(
    model: nn.Module, train: Dataset, test: Dataset, pgd: dict | None = None, batch_size: int | None = None
) -> dict:
    """Everything that is measured once a run has been trained.

    Args:
        model: The trained network, not wrapped.
        train: Training images as they are, without augmentation; losses are of up to 5,000 of them, evenly spread.
        test: All test images.
        pgd: ``dict(eps=[...], steps=...)`` of the attack on all test images, eps in 1/255; None: no PGD.
        batch_size: Images of each pass; None: what suits a CPU.

    Returns:
        ``{split}_loss`` (nats), ``{split}_top1`` (%), ``{split}_margin`` (median over the samples) and
        ``{split}_samples`` of training and test images; ``pgd<steps>/top1_eps<E>`` (%); and ``norms``.
    """
    found = {}
    some = Subset(train, spread(len(train), _GAP_SAMPLES))
    for split, dataset in (("train", some), ("test", test)):
        measured = evaluate(model, dataset, batch_size or _BATCH_SIZE)
        found |= {f"{split}_{key}": value for key, value in measured.items()}
    if pgd is not None:
        options = {"pgd_steps": pgd["steps"], "batch_size": batch_size or _ATTACKED_AT_A_TIME}
        attacked = measure_robustness(model, test, pgd["eps"], **options)
        found |= {f"pgd{pgd['steps']}/top1_eps{eps:g}": top1 for eps, top1 in attacked.pgd.items()}
    return {**found, "norms": norms(model, test)}


def training_images(cfg: Config) -> Dataset:
    """The training set of a config under its validation pipeline."""
    return DATASETS.build({**cfg.train_dataloader.dataset, "pipeline": find_pipeline(cfg.val_dataloader.dataset)})


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, batch_size: int = _BATCH_SIZE) -> dict[str, float]:
    """Mean cross entropy (nats), top-1 (%), median margin and number of the samples.

    The margin of a sample is the logit of its class less the largest other one: it is negative for an error, and has
    the scale of the logits, as the root of the GBR has.
    """
    loss = correct = 0.0
    margins = []
    device = next(model.parameters()).device
    with untouched(model):
        classify = PixelClassifier(model)
        for pixels, labels in DataLoader(dataset, batch_size=batch_size, collate_fn=collate_pixels):
            pixels, labels = pixels.to(device), labels.to(device)
            logits = classify(pixels.float()).double()
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
            margins.append(margin(logits, labels))
    margins = torch.cat(margins)
    count = len(margins)
    return {
        "loss": loss / count,
        "top1": 100 * correct / count,
        "margin": margins.quantile(0.5).item(),
        "samples": count,
    }


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the true class less the largest other one, ``(N,)``, of ``(N, C)`` logits."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -math.inf)
    return own - others.amax(1)


def norms(model: nn.Module, dataset: Dataset) -> dict:
    """Norms of free weights and of the weights with batch norms folded in, and the bounds on the GBR that they give."""
    images = torch.stack([dataset[i]["inputs"] for i in range(2)])
    inputs = model.data_preprocessor({"inputs": images}, training=False)["inputs"]
    with untouched(model):
        folded: FoldedAudit = audit(model, folded=True, inputs=inputs)
        residual = residual_bound(model, folded, inputs)
    weights = [m.weight.detach().double() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    found = {
        "sum_sq_free": sum(w.square().sum().item() for w in weights),
        "layers": len(folded),
        "unfolded": len(folded.unfolded),
        "kernel_log_product": folded.kernel_chain["log_product"],
        "sq_norms": [row.sq_norm for row in folded],
        "residual_log_bound": residual,
    }
    if folded.map_chain is not None:
        found["map_log_product"] = folded.map_chain["log_product"]
    rows = audit(model)
    if rows:
        found["enc_max_deviation"] = rows.max_deviation
    return found


def residual_bound(model: nn.Module, folded: FoldedAudit, inputs: Tensor) -> float:
    """Logarithm of the bound on the GBR of a CIFAR ResNet of mmpretrain (:func:`residual_log_bound`).

    Args:
        model: Classifier in eval mode, with a ``ResNet_CIFAR`` backbone and a linear head.
        folded: Its audit, with the norms of the linear maps on ``inputs``.
        inputs: A batch, normalised.
    """
    backbone = model.backbone
    calls = record_forward(model, (inputs,)).calls
    sizes = {module: (1, *calls[module][0].input.shape[1:]) for module in (backbone.conv1, *_blocks(backbone))}
    map_norm = {row.name: math.sqrt(row.map_sq_norm) for row in folded}
    names = {module: name for name, module in model.named_modules()}
    stem = map_spectral_norm(nn.Sequential(backbone.conv1, backbone.norm1), inputs.new_zeros(sizes[backbone.conv1]))
    blocks = []
    for block in _blocks(backbone):
        shortcut = 1.0
        if block.downsample is not None:
            shortcut = map_spectral_norm(block.downsample, inputs.new_zeros(sizes[block]))
        branch = [
            norm
            for name, norm in map_norm.items()
            if name.startswith(f"{names[block]}.") and not name.startswith(f"{names[block]}.downsample")
        ]
        blocks.append((shortcut, branch))
    classifier = next(norm for name, norm in map_norm.items() if name.startswith("head."))
    return residual_log_bound(classifier**2, stem, blocks)


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    return [block for name in backbone.res_layers for block in getattr(backbone, name)]
