"""The layers that ENC is timed against, put into the same networks in the place of every convolution."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from enc_plugin import to_enc
from enc_plugin.optim import DEFAULT_SHIFT_EPS, add_shift, param_groups_enc

DECAY, LR, MOMENTUM = 1e-4, 1e-3, 0.9


class NaiveConv2d(nn.Conv2d):
    """Eq. 22 as one would write it down, with alpha 1."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / std / self.weight.numel() ** 0.5
        return self._conv_forward(input, weight, self.bias)


class CopyConv2d(nn.Conv2d):
    """The floor of all layers that compute their weight: it is a copy of the parameter."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.clone(), self.bias)


def replace_convolutions(model: nn.Module, cls: type[nn.Conv2d]) -> nn.Module:
    """Put layers of ``cls`` with the same settings and weights in the place of all ``nn.Conv2d``, in place."""
    for module in list(model.modules()):
        for name, conv in module.named_children():
            if type(conv) is nn.Conv2d:
                options = {k: getattr(conv, k) for k in ("stride", "padding", "dilation", "groups")}
                twin = cls(conv.in_channels, conv.out_channels, conv.kernel_size, bias=conv.bias is not None, **options)
                twin.load_state_dict(conv.state_dict())
                setattr(module, name, twin)
    return model


def _enc(variant: str) -> Callable[[nn.Module], nn.Module]:
    def convert(model: nn.Module) -> nn.Module:
        to_enc(model, variant)
        return model

    return convert


def _torch_weight_norm(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight_norm(module)
    return model


# Name to conversion in place. The rivals below ENC replace the convolutions alone, except torch's, which takes the
# classifier too; ENC converts every layer and gives the classifier a batch norm.
CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "ENC, eq. 20": _enc("fro"),
    "ENC, eq. 21": _enc("wn"),
    "ENC, eq. 22": _enc("ws"),
    "ENC, eq. 23": _enc("centered_fro"),
    "torch weight_norm": _torch_weight_norm,
    "timm StdConv2d": lambda model: replace_convolutions(model, StdConv2d),
    "mmcv ConvWS2d": lambda model: replace_convolutions(model, ConvWS2d),
    "naive eq. 22": lambda model: replace_convolutions(model, NaiveConv2d),
    "a copy of the weight": lambda model: replace_convolutions(model, CopyConv2d),
}


def converted(model: nn.Module, names: tuple[str, ...] = tuple(CONVERSIONS)) -> dict[str, nn.Module]:
    """A converted copy of ``model`` for each name."""
    return {name: CONVERSIONS[name](copy.deepcopy(model)) for name in names}


def sgd(model: nn.Module, shift: bool = True, **options) -> torch.optim.SGD:
    """SGD with momentum and decay; on an ENC network with the epsilon shift, elsewhere one group of all parameters."""
    groups = param_groups_enc(model, DECAY, shift_eps=DEFAULT_SHIFT_EPS if shift else 0.0)
    if not any("shift_eps" in group for group in groups):
        return torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=DECAY, **options)
    optimizer = torch.optim.SGD(groups, LR, MOMENTUM, **options)
    add_shift(optimizer)
    return optimizer
