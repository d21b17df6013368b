"""ATen calls and memory for backward of a training step of ResNet-50, compared with the plain network.

These numbers do not depend on the machine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from enc_plugin.surgery.startup_average import drop_averages

from .harness import goal
from .networks import resnet50
from .rivals import converted


class CallCount(TorchDispatchMode):
    """Counts the ATen calls within the context, without views, which cost nothing."""

    FREE = ("view", "reshape", "detach", "t.default", "expand", "unsqueeze", "permute", "transpose", "alias")
    FREE += ("split.", "split_with_sizes.", "select.", "slice.", "as_strided.")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not func.__name__.startswith(self.FREE) and "view" not in func.__name__
        return func(*args, **(kwargs or {}))


def footprint(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[int, int, int]:
    """ATen calls of forward and backward, and bytes saved for backward (with parameters; each storage counts once)."""
    drop_averages(model)  # startup averages would count, but end after the first ten steps
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # kept alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), CallCount() as forward:
        loss = cross_entropy(model(images), labels)
    size = sum(storage.nbytes() for storage in kept.values())
    with CallCount() as backward:
        loss.backward()
    return forward.calls, backward.calls, size


def run(rounds: int = 1, batch: int = 4, size: int = 64) -> dict:
    """Count once; ``rounds`` has no effect."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    networks = converted(resnet50())
    found = {name: footprint(network.train(), images, labels) for name, network in networks.items()}
    weights = [p for p in networks["plain"].parameters() if p.ndim > 1]
    elements = sum(4 * p.numel() for p in weights)
    forward, backward, plain = found["plain"]
    counts = {
        name: {
            "calls_per_layer_forward": (row[0] - forward) / len(weights),
            "calls_per_layer_backward": (row[1] - backward) / len(weights),
            "kept_for_backward_over_plain_in_weights": (row[2] - plain) / elements,
        }
        for name, row in found.items()
    }
    kept = "kept_for_backward_over_plain_in_weights"
    return {
        "what": f"ResNet-50, batch {batch}, {size} x {size}: calls and memory over plain, per layer",
        "counts": counts,
        # The batch norm of the classifier and the row statistics have 0.002 times the size of the weights.
        "goals": [
            goal(f"{name}: memory over plain, in weights", row[kept], 1.01)
            for name, row in counts.items()
            if name.startswith("ENC")
        ],
    }
