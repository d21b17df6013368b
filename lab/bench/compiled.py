"""Training step of ResNet-18 at 4 x 64 x 64, eager and under torch.compile: plain, ENC and similar layers.

The epsilon shift is off, because it is part of the optimizer step, which is not compiled.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from .harness import interleave, ratios
from .rivals import converted, sgd
from .training_step import step

NETWORKS = ("plain", "ENC wn", "ENC ws", "torch weight_norm", "timm StdConv2d", "naive ws")


def _loss(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(network(images), labels)


def run(rounds: int = 25) -> dict:
    """Measure both tables; takes about three minutes on an idle core, mostly for compilation."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(1000, (4,))
    result: dict = {"what": "training step without the shift, ResNet-18, batch 4, 64 x 64, float32"}
    for compiled in (False, True):
        networks = converted(resnet18(), NETWORKS)
        steps = {}
        for name, network in networks.items():
            loss = partial(_loss, network)
            loss = partial(torch.compile(loss) if compiled else loss, images, labels)
            steps[name] = step(sgd(network.train(), shift=False), loss)
        name = "compiled_to_plain" if compiled else "eager_to_plain"
        result[name] = ratios(interleave(steps, rounds, warmup=3), "plain")
    return result
