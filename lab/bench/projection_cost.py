"""ENC as a projection beside ENC layers and the plain network, ResNet-50, 4 x 64 x 64: training, optimizer, inference.

The plain network runs twice in each round, as in the section ``training_step``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from enc_plugin import to_enc
from enc_plugin.surgery.startup_average import drop_averages

from .harness import goal, interleave, ratios
from .networks import resnet50
from .rivals import converted, sgd
from .training_step import step

BATCH, SIZE, CLASSES = 4, 64, 1000


def candidates() -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    """The networks with the same initial weights, and an optimizer for each."""
    plain = resnet50()
    networks = {**converted(plain, ("plain", "ENC ws")), "plain again": plain}
    found = {name: (network, sgd(network)) for name, network in networks.items()}
    for mode in ("retract", "rotate"):
        network = copy.deepcopy(plain)
        to_enc(network, "ws", how="project")
        drop_averages(network)
        found[f"ENC ws, {mode}"] = network, sgd(network, projection=mode)
    return found


def run(rounds: int = 41) -> dict:
    """Time the three kinds of calls one after the other; takes about five minutes on an idle core."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (BATCH,))
    pairs = candidates()

    def training_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        step(optimizer, lambda: cross_entropy(network(images), labels))()

    def inference(network: nn.Module, _: torch.optim.Optimizer) -> None:
        with torch.inference_mode():
            network(images)

    def table(call: Callable[[nn.Module, torch.optim.Optimizer], None]) -> dict:
        calls = {name: lambda pair=pair: call(*pair) for name, pair in pairs.items()}
        return ratios(interleave(calls, rounds, warmup=2), "plain")

    for network, _ in pairs.values():
        network.train()
    result = {
        "what": f"ENC as a projection, ResNet-50, batch {BATCH}, {SIZE} x {SIZE}, float32, one thread",
        "training_step": table(training_step),
        "optimizer_step": table(lambda _, optimizer: optimizer.step()),  # with the last gradients
    }
    for network, _ in pairs.values():
        network.eval()
    result["inference"] = table(inference)
    goals = [goal("training step: ENC ws, retract, to plain", result["training_step"]["ENC ws, retract"], 1.04)]
    for mode in ("retract", "rotate"):
        goals.append(goal(f"inference: ENC ws, {mode}, to plain", result["inference"][f"ENC ws, {mode}"], 1.02, 0.98))
    return result | {"goals": goals}
