"""Training step of ResNet-20 (CIFAR) at batch 128: plain and ENC, with the optimizers that their configs build."""

from __future__ import annotations

from pathlib import Path

import torch
from harness import interleave, ratios
from mmengine.config import Config
from mmpretrain.registry import MODELS
from torch.nn.functional import cross_entropy

import enc_plugin  # noqa: F401
from enc_plugin.engine import ENCOptimWrapperConstructor

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "cifar10"
IMAGES_AN_EPOCH = 50_000


def run(rounds: int = 15, batch: int = 128) -> dict:
    """Seconds a step (forward, backward, optimizer) and what they come to in an epoch of 50,000 images."""
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    steps = {}
    for name, config in (("plain", "resnet20_2xb64.py"), ("ENC, eq. 22", "resnet20_enc-ws_2xb64.py")):
        cfg = Config.fromfile(CONFIGS / config)
        model = MODELS.build(cfg.model)
        wrapper = ENCOptimWrapperConstructor(dict(optimizer=cfg.optim_wrapper.optimizer))(model)
        steps[name] = lambda model=model, wrapper=wrapper: wrapper.update_params(cross_entropy(model(images), labels))
    table = ratios(interleave(steps, rounds, warmup=2), "plain")
    return {
        "what": f"training step, ResNet-20 (CIFAR), batch {batch}, float32, data loading left out",
        "unit": "seconds a step; ratio to plain, round by round",
        "to_plain": table,
        "seconds_an_epoch": {name: row["seconds"] * IMAGES_AN_EPOCH / batch for name, row in table.items()},
    }
