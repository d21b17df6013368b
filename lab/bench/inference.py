"""Inference, ResNet-50: the stock network, ENC live and folded, and rivals live; one picture, and batches of 32.

The stock network runs twice a round: how far from 1 the ratio of two equal networks gets on this machine. Folded
follows a network of its own kind; those that write effective weights have runs of their own.
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
LIVE = (
    "plain",
    "ENC, eq. 21",
    "ENC, eq. 22",
    "torch weight_norm",
    "timm StdConv2d",
    "naive eq. 22",
    "a copy of the weight",
)


def timed(networks: dict[str, nn.Module], images: torch.Tensor, rounds: int) -> dict:
    """Forward passes in eval mode; ratios to ``plain``, round by round."""

    def forward(network: nn.Module) -> None:
        with torch.inference_mode():
            network(images)

    calls = {name: lambda n=network: forward(n) for name, network in networks.items()}
    return ratios(interleave(calls, rounds, warmup=2), "plain")


def run(rounds: int = 41) -> dict:
    """Batch 1 in ``rounds`` rounds, batch 32 in an eighth of them; about five minutes on a quiet core."""
    torch.manual_seed(0)
    live = {name: network.eval() for name, network in converted(resnet50(), LIVE).items()}
    plain = live["plain"]
    folded = {"plain": plain, "ENC, folded": fold(live["ENC, eq. 22"]), "plain again": copy.deepcopy(plain)}
    result: dict = {"what": f"inference, ResNet-50, {SIZE} x {SIZE}, float32"}
    for batch in (1, 32):
        images = torch.randn(batch, 3, SIZE, SIZE)
        count = rounds if batch == 1 else max(3, rounds // 8)
        result[f"folded_batch_{batch}"] = timed(folded, images, count)
        result[f"live_batch_{batch}"] = timed(live, images, count)
    goals = [goal("live ENC, eq. 22, batch 1, to plain", result["live_batch_1"]["ENC, eq. 22"], 1.03)]
    for batch in (1, 32):
        found = result[f"folded_batch_{batch}"]["ENC, folded"]
        goals.append(goal(f"folded ENC, batch {batch}, to plain", found, 1.02, 0.98))
    return result | {"goals": goals}
