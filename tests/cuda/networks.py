"""Small networks and training steps that several tests of the CUDA suite share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from enc_plugin import add_projection, add_shift, param_groups_enc, to_enc

DECAY, SHIFT_EPS = 1e-1, 1.0

# Relative error of a parameter after up to five steps in float32. Noise of 1e-6 (ten times the rounding) in the outputs
# and gradients of all layers changes parameters by up to 3e-5. A run without the shift differs by 2e-2 (AdamW: 1.6e-3).
TOLERANCE = 2e-4


def network(variant: str | None = "ws", alpha: float | str = 1.0, how: str = "reparametrize") -> nn.Module:
    """Convolutions, batch norms and a classifier for pictures of 16 x 16 in 10 classes, on the CPU.

    It is smooth: one ReLU that rounding turns on or off would change a parameter by 5e-3.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (3, 16, 32):
        layers += [nn.Conv2d(width, 2 * max(width, 8), 3, bias=False), nn.BatchNorm2d(2 * max(width, 8)), nn.SiLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10, bias=False))
    if variant is not None:
        to_enc(net, variant, alpha, how=how)
    return net


def batch(device: torch.device, count: int = 8) -> tuple[Tensor, Tensor]:
    """Pictures of different brightness and labels, the same on all devices.

    The batch norm of the classifier magnifies rounding if pictures are alike.
    """
    generator = torch.Generator().manual_seed(1)
    brightness = torch.rand(count, 3, 1, 1, generator=generator)
    pictures = brightness * torch.rand(count, 3, 16, 16, generator=generator)
    return pictures.to(device), torch.randint(10, (count,), generator=generator).to(device)


def optimizer_of(
    net: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.SGD, projection: str | None = None, **options
):
    """An optimizer with the shifted decay or, of a projected network, the projection."""
    # With the usual eps, Adam magnifies the rounding of gradients near 0: it divides them by the root of their square.
    options = ({"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 1e-2, "eps": 1e-2}) | options
    settings = {} if projection is None else {"projection": projection}
    optimizer = kind(param_groups_enc(net, DECAY, shift_eps=SHIFT_EPS, **settings), **options)
    add_shift(optimizer)
    if projection is not None:
        add_projection(optimizer)
    return optimizer


def stepper(
    net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, dtype: torch.dtype | None = None
) -> Callable[[], Tensor]:
    """A call that takes one training step, under autocast to ``dtype`` if given, and returns the loss."""

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            loss = cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def errors(net: nn.Module, twin: nn.Module) -> float:
    """Largest relative error of a parameter of ``net``, compared with ``twin``."""
    return max(error(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
