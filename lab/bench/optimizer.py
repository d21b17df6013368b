"""The optimizer step: ENC's parameter groups and shift, compared with torch's SGD and mmengine's groups."""

from __future__ import annotations

import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from .harness import goal, interleave, ratios
from .networks import resnet50
from .rivals import DECAY, LR, MOMENTUM, converted, sgd

PER_PARAMETER = dict(norm_decay_mult=1.0)  # any option makes mmengine's constructor put each parameter in its own group


def mmengine_sgd(model: nn.Module, **options) -> torch.optim.Optimizer:
    """An SGD optimizer built by mmengine's optimizer wrapper constructor."""
    optimizer = dict(type="SGD", lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    return build_optim_wrapper(model, dict(optimizer=optimizer, **options)).optimizer


def run(rounds: int = 41) -> dict:
    """Time ``optimizer.step`` of ResNet-50 with fixed gradients; takes a minute."""
    torch.manual_seed(0)
    nets = converted(resnet50(), ("plain", "ENC fro", "ENC wn", "ENC ws", "ENC centered_fro"))
    for net in nets.values():
        for p in net.parameters():
            p.grad = torch.randn_like(p)
    plain, enc = nets["plain"], nets["ENC ws"]
    optimizers = {"torch SGD": sgd(plain), "torch SGD, fused": sgd(plain, fused=True)}
    optimizers["mmengine, a group for each parameter"] = mmengine_sgd(plain, paramwise_cfg=PER_PARAMETER)
    optimizers |= {name: sgd(net) for name, net in nets.items() if name != "plain"}
    constructor = dict(constructor="ENCOptimWrapperConstructor")
    optimizers["ENC ws, mmengine"] = mmengine_sgd(enc, **constructor)
    optimizers["ENC ws, no shift"] = mmengine_sgd(enc, **constructor, paramwise_cfg=dict(shift_eps=0.0))
    optimizers["ENC ws, fused"] = sgd(enc, fused=True)
    table = ratios(interleave({k: o.step for k, o in optimizers.items()}, rounds, warmup=2), "torch SGD")
    return {
        "what": "optimizer step, ResNet-50, SGD with momentum and decay, float32",
        "to_torch_sgd": table,
        "groups": {name: len(o.param_groups) for name, o in optimizers.items()},
        "goals": [
            goal(f"{name}, with the shift, to torch SGD", table[name], 1.25) for name in ("ENC ws", "ENC ws, fused")
        ],
    }
