"""Weight normalization as a convolution layer with stock keys, the baseline for variant ``'wn'``."""

from __future__ import annotations

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import RefusesRescaledRows


@MODELS.register_module()
class WNConv2d(RefusesRescaledRows, nn.Conv2d):
    r""":class:`torch.nn.Conv2d` with weight normalization (Salimans & Kingma, 2016): a learnable gain for every row.

    .. math:: \hat W_j = g_j\, W_j / \lVert W_j \rVert

    It computes the same as :func:`torch.nn.utils.parametrizations.weight_norm`, with the stock keys ``weight`` and
    ``bias`` and the additional key ``gain``. Gains start at 1 as in the ENC paper
    (:math:`\lVert\hat W\rVert_F = \sqrt m`), and the batch norm that follows restores the scale. Loading a checkpoint
    without gains sets them to the row norms, so that the layer computes the same as the stock one. In a backbone,
    ``conv_cfg=dict(type='WNConv2d')`` replaces every convolution.

    Example:
        >>> layer = WNConv2d(16, 32, kernel_size=3)
        >>> round(layer.effective_weight.square().sum().item(), 3)
        32.0
    """

    _instead = "Put a torch.nn.Conv2d with the weight effective_weight in the layer's place and fuse that"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones_like(self.weight[:, :1, :1, :1]))

    @property
    def effective_weight(self) -> Tensor:
        """The weight that the layer computes with, shaped like ``weight`` (differentiable)."""
        return torch._weight_norm(self.weight, self.gain, 0)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the effective weight: ``(N, C_in, H, W)`` to ``(N, C_out, H', W')``."""
        return nn.Conv2d._conv_forward(self, input, self.effective_weight, self.bias)

    def _normalises_rows(self) -> bool:
        return "gain" in self._parameters

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and f"{prefix}gain" not in state_dict:
            state_dict[f"{prefix}gain"] = weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
