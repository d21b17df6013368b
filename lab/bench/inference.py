"""Inference of ResNet-50 with one image and with batches of 32: plain, ENC live and folded, and similar layers live.

The plain network runs twice in each round, which shows how far the ratio of two equal networks is from 1 on this
machine. Live networks, which write effective weights to memory, and folded networks are timed in separate runs.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from enc_plugin import fold

from .harness import goal, interleave, ratios
from .networks import resnet50
from .rivals import converted

SIZE = 224
LIVE = ("plain", "ENC wn", "ENC ws", "torch weight_norm", "timm StdConv2d", "naive ws", "a copy of the weight")


def timed(networks: dict[str, nn.Module], images: torch.Tensor, rounds: int) -> dict:
    """Time forward passes in eval mode; ratios to ``plain``."""

    def forward(network: nn.Module) -> None:
        with torch.inference_mode():
            network(images)

    calls = {name: lambda n=network: forward(n) for name, network in networks.items()}
    return ratios(interleave(calls, rounds, warmup=2), "plain")


def run(rounds: int = 41) -> dict:
    """Measure ``rounds`` rounds with batch 1 and an eighth with batch 32; takes about five minutes on an idle core."""
    torch.manual_seed(0)
    live = {name: network.eval() for name, network in converted(resnet50(), LIVE).items()}
    plain = live["plain"]
    folded = {"plain": plain, "ENC, folded": fold(live["ENC ws"]), "plain again": copy.deepcopy(plain)}
    result: dict = {"what": f"inference, ResNet-50, {SIZE} x {SIZE}, float32"}
    for batch in (1, 32):
        images = torch.randn(batch, 3, SIZE, SIZE)
        count = rounds if batch == 1 else max(3, rounds // 8)
        result[f"folded_batch_{batch}"] = timed(folded, images, count)
        result[f"live_batch_{batch}"] = timed(live, images, count)
    goals = [goal("live ENC ws, batch 1, to plain", result["live_batch_1"]["ENC ws"], 1.03)]
    for batch in (1, 32):
        found = result[f"folded_batch_{batch}"]["ENC, folded"]
        goals.append(goal(f"folded ENC, batch {batch}, to plain", found, 1.02, 0.98))
    return result | {"goals": goals}
