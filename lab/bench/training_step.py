"""Training step (forward, backward, optimizer) of plain, ENC and similar layers, for small and large images.

The plain network runs twice in each round, which shows how far the ratio of two equal networks is from 1 on this
machine. A layer that computes its weight takes at least the time of one that copies it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .harness import goal, interleave, ratios
from .networks import resnet20, resnet50
from .rivals import CONVERSIONS, converted, sgd

# Network, classes, batch, size, share of the rounds.
CASES = {
    "resnet50_4x64": (resnet50, 1000, 4, 64, 1.0),
    "resnet20_128x32": (resnet20, 10, 128, 32, 1.0),
    "resnet50_8x224": (resnet50, 1000, 8, 224, 0.27),
}

BOUNDS = {"resnet50_4x64": 1.10, "resnet50_8x224": 1.02}


def step(optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A function that takes one step of ``optimizer`` on ``loss``."""

    def call() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return call


def case(name: str, rounds: int) -> tuple[dict, list[dict]]:
    """The times of one case, and its rows of the table of goals."""
    build, classes, batch, size, factor = CASES[name]
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))

    def loss_of(network: nn.Module) -> Callable[[], torch.Tensor]:
        return lambda: cross_entropy(network(images), labels)

    networks = converted(build())
    networks["plain again"] = build()
    steps = {key: step(sgd(network.train()), loss_of(network)) for key, network in networks.items()}
    for key in ("ENC wn", "ENC ws"):  # without the shift, for a comparison of the layers
        network = CONVERSIONS[key](build()).train()
        steps[f"{key}, no shift"] = step(sgd(network, shift=False), loss_of(network))
    seconds = interleave(steps, max(3, round(rounds * factor)), warmup=2)
    found = {
        "what": f"training step, {build.__name__}, batch {batch}, {size} x {size}, float32, without data loading",
        "to_plain": ratios(seconds, "plain"),
    }
    goals = []
    if name in BOUNDS:
        goals.append(goal(f"{name}: ENC ws, to plain", found["to_plain"]["ENC ws"], BOUNDS[name]))
    for rival in ("timm StdConv2d", "mmcv ConvWS2d", "naive ws"):
        goals.append(goal(f"{name}: ENC ws, to {rival}", ratios(seconds, rival)["ENC ws"], 1.0))
    for ours in ("ENC wn", "ENC wn, no shift"):
        goals.append(goal(f"{name}: {ours}, to torch weight_norm", ratios(seconds, "torch weight_norm")[ours], 1.0))
    return found, goals


def run(rounds: int = 41) -> dict:
    """Run all cases; takes about eleven minutes on an idle core."""
    torch.set_num_threads(1)
    result: dict = {"what": "training step (forward, backward, SGD), float32, without data loading"}
    goals = []
    for name in CASES:
        result[name], found = case(name, rounds)
        goals += found
    return result | {"goals": goals}
