"""The layers that ENC is compared with, which replace the convolutions of the same networks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from enc_plugin import to_enc
from enc_plugin.optim import DEFAULT_SHIFT_EPS, add_projection, add_shift, param_groups_enc
from enc_plugin.surgery.startup_average import drop_averages

DECAY, LR, MOMENTUM = 1e-4, 1e-3, 0.9


class NaiveConv2d(nn.Conv2d):
    """The obvious implementation of ENC ``'ws'`` (eq. 22) with alpha 1."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / std / self.weight.numel() ** 0.5
        return self._conv_forward(input, weight, self.bias)


class CopyConv2d(nn.Conv2d):
    """A convolution with a copy of its weight: the lower limit of the time of any layer that computes its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.clone(), self.bias)


def replace_convolutions(model: nn.Module, cls: type[nn.Conv2d]) -> nn.Module:
    """Replace all ``nn.Conv2d`` in ``model`` by ``cls`` with the same settings and weights."""
    for module in list(model.modules()):
        for name, conv in module.named_children():
            if type(conv) is nn.Conv2d:
                options = {k: getattr(conv, k) for k in ("stride", "padding", "dilation", "groups")}
                options["bias"] = conv.bias is not None
                new = cls(conv.in_channels, conv.out_channels, conv.kernel_size, **options)
                new.load_state_dict(conv.state_dict())
                setattr(module, name, new)
    return model


def _enc(variant: str) -> Callable[[nn.Module], nn.Module]:
    def convert(model: nn.Module) -> nn.Module:
        to_enc(model, variant)
        drop_averages(model)  # of a run's first ten steps, which its time does not depend on
        return model

    return convert


def _torch_weight_norm(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight_norm(module)
    return model


# Name -> in-place conversion. ENC converts every layer and adds a batch norm to the classifier, torch's weight norm
# converts every layer, and the others convert only convolutions.
CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "ENC fro": _enc("fro"),
    "ENC wn": _enc("wn"),
    "ENC ws": _enc("ws"),
    "ENC centered_fro": _enc("centered_fro"),
    "torch weight_norm": _torch_weight_norm,
    "timm StdConv2d": lambda model: replace_convolutions(model, StdConv2d),
    "mmcv ConvWS2d": lambda model: replace_convolutions(model, ConvWS2d),
    "naive ws": lambda model: replace_convolutions(model, NaiveConv2d),
    "a copy of the weight": lambda model: replace_convolutions(model, CopyConv2d),
}


def converted(model: nn.Module, names: tuple[str, ...] = tuple(CONVERSIONS)) -> dict[str, nn.Module]:
    """A converted copy of ``model`` for each name."""
    return {name: CONVERSIONS[name](copy.deepcopy(model)) for name in names}


def sgd(model: nn.Module, shift: bool = True, projection: str | None = None, **options) -> torch.optim.SGD:
    """SGD with momentum and weight decay; with the shift or the projection for an ENC network, else a single group."""
    settings = {} if projection is None else {"projection": projection}
    groups = param_groups_enc(model, DECAY, shift_eps=DEFAULT_SHIFT_EPS if shift else 0.0, **settings)
    if not any("shift_eps" in group or "enc_projection" in group for group in groups):
        return torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=DECAY, **options)
    optimizer = torch.optim.SGD(groups, LR, MOMENTUM, **options)
    add_shift(optimizer)
    if projection is not None:
        add_projection(optimizer)
    return optimizer
