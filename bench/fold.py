"""Inference with a folded network against the stock network, ResNet-50 and one picture; and with the live ENC network.

The stock network runs twice a round: how far from 1 the ratio of two equal networks gets on this machine.
"""

from __future__ import annotations

import copy

import torch
from harness import interleave, ratios, save
from mmengine.hub import get_config
from mmpretrain.registry import MODELS

from enc_plugin import fold, to_enc

MODEL = "mmpretrain::resnet/resnet50_8xb32_in1k.py"
SIZE = 224


def run(rounds: int = 41, batch: int = 1) -> dict:
    """Time forward passes in eval mode; ratios to the stock network, round by round."""
    torch.manual_seed(0)
    stock = MODELS.build(get_config(MODEL).model).eval()
    live = copy.deepcopy(stock)
    to_enc(live)
    folded, again = fold(live), copy.deepcopy(stock)
    images = torch.randn(batch, 3, SIZE, SIZE)

    def forward(network):
        with torch.inference_mode():
            network(images)

    # Each follows a network of its own kind; the live one, which writes effective weights, has a run of its own.
    networks = {"stock": stock, "folded": folded, "stock again": again}
    seconds = interleave({k: lambda n=n: forward(n) for k, n in networks.items()}, rounds, warmup=3)
    beside = {"stock": stock, "live ENC": live}
    live_seconds = interleave({k: lambda n=n: forward(n) for k, n in beside.items()}, rounds, warmup=3)
    return {
        "what": f"inference, ResNet-50, batch {batch}, {SIZE} x {SIZE}, float32",
        "unit": "seconds a forward pass; ratio to the stock network, round by round",
        "to_stock": ratios(seconds, "stock"),
        "live_to_stock": ratios(live_seconds, "stock"),
        "bound": {"ratio": 1.03, "floor": 0.97},
    }


if __name__ == "__main__":
    result = run()
    for table in ("to_stock", "live_to_stock"):
        for name, row in result[table].items():
            print(f"{name:12} {row['seconds'] * 1e3:8.1f} ms   {row['ratio']:.3f} of stock")
    print(save("fold", result))
