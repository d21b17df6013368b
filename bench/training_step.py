"""Training step (forward, backward, optimizer): plain, ENC and its rivals, from weights that dominate to images that do.

The plain network runs twice a round: how far from 1 the ratio of two equal networks gets on this machine.
"""

from __future__ import annotations

import torch
from harness import interleave, ratios
from rivals import converted, resnet20, resnet50, sgd
from torch import nn
from torch.nn.functional import cross_entropy

IMAGES_AN_EPOCH = 50_000

# Section: network, classes, batch, size, rounds for each of `rounds`.
CASES = {
    "resnet50_4x64": (resnet50, 1000, 4, 64, 3),
    "resnet20_128x32": (resnet20, 10, 128, 32, 1),
    "resnet50_8x224": (resnet50, 1000, 8, 224, 0.5),
}


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor):
    """A call that takes one step, and the optimizer's own part."""
    model.train()
    optimizer = sgd(model)

    def call():
        optimizer.zero_grad()
        cross_entropy(model.head.fc(model.extract_feat(images)[0]), labels).backward()
        optimizer.step()

    return call


def case(name: str, rounds: int) -> dict:
    build, classes, batch, size, factor = CASES[name]
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))
    networks = converted(build())
    networks["plain again"] = converted(build(), ("plain",))["plain"]
    steps = {key: step(network, images, labels) for key, network in networks.items()}
    table = ratios(interleave(steps, max(5, round(rounds * factor)), warmup=2), "plain")
    return {
        "what": f"training step, {build.__name__}, batch {batch}, {size} x {size}, float32, data loading left out",
        "to_plain": table,
    }


if __name__ == "__main__":
    import sys
    torch.set_num_threads(1)
    r = case(sys.argv[1], int(sys.argv[2]))
    for k, v in r["to_plain"].items(): print(f"{k:20} {v['seconds']*1e3:8.1f} ms {v['ratio']:.3f} {v['ratio_min']:.3f} {v['ratio_max']:.3f}")
