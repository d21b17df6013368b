"""Folding: from an ENC network to a plain network with the same outputs."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from torch import Tensor, nn

from ..functional.checks import check_model
from ..functional.normalizable import check_normalizable
from ..layers import ENCLayer, enc_layers
from ..layers.reparametrized import deep_copy
from ..packed import unpack_weights
from .conversion_report import NoEffectWarning
from .eligible import refuse_weights_read_elsewhere
from .projected import constrained_layers, unmark
from .recording import RecordError, record_forward
from .startup_average import drop_averages


def fold(model: nn.Module, example: Tensor | tuple | dict | None = None) -> nn.Module:
    r"""Return a plain network with the outputs that ``model`` has in eval mode: the inverse of :func:`to_enc`.

    Weights become :math:`\hat W`, and post-norms are merged into weight and bias. ENC classes become the stock classes
    (``ENCImageClassifier`` becomes ``ImageClassifier``). The state dict loads strictly into the stock model.

    Args:
        model: Any ``nn.Module`` with ENC layers; it does not change.
        example: An input batch, as for :func:`to_enc`. A forward pass on it checks that no other module reads the
            weights of the ENC layers. None: one is generated if possible.

    Returns:
        A new model in the mode (train or eval) of ``model``. A layer with a post-norm but without a bias gets a bias;
        only then does the state dict not fit the stock model.

    Raises:
        ValueError: If an effective weight is not defined (a constant row, NaN), a post-norm has no running statistics,
            another module computes with the free weight of an ENC layer, or the network does not run on ``example``.

    Warns:
        NoEffectWarning: If there is no ENC layer; the result is then a copy.

    Example:
        >>> import enc_plugin
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10)).eval()
        >>> _ = enc_plugin.to_enc(model)
        >>> plain = fold(model)
        >>> type(plain[3]).__name__, list(plain[3].state_dict())
        ('Linear', ['weight', 'bias'])
    """
    check_model(model)
    if next(constrained_layers(model), None) is None:
        warnings.warn(f"fold changed nothing: {type(model).__name__} has no ENC layer", NoEffectWarning, stacklevel=2)
    for name, layer in enc_layers(model):
        if not layer.weight.is_meta:
            check_normalizable(name, layer.enc_free_weight, layer.enc_variant, layer.enc_kept)
    try:
        refuse_weights_read_elsewhere(model, record_forward(model, example))
    except RecordError as error:
        if example is not None:
            raise ValueError(f"example: {error}") from error
    model = deep_copy(model)
    for module in list(model.modules()):
        for name in [key for key, value in module.__dict__.items() if isinstance(value, _FoldFirst)]:
            delattr(module, name)
        become_plain = getattr(module, "become_plain", None)  # ENC layers and ENCImageClassifier have it
        if become_plain is not None:
            become_plain()
    unmark(model)
    drop_averages(model)
    unpack_weights(model)
    return model


class _FoldFirst:
    """Replaces a block's ``fuse`` while the block has ENC layers, because ``fuse`` would merge the free weights."""

    def __init__(self, owner: str, method: str):
        self.owner, self.method = owner, method

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{self.owner}.{self.method} merges the weights of its layers, but ENC layers compute with the effective "
            f"weights; call enc_plugin.fold(model) first and use {self.method} on the plain model that it returns"
        )


def guard_fusers(model: nn.Module) -> None:
    """Make ``fuse`` of blocks with ENC layers (RepVGG, MobileOne, LeViT, ...) raise and point to :func:`fold`."""
    for module in model.modules():
        if next(enc_layers(module), None) is None:
            continue
        owner = module.plain_class if isinstance(module, ENCLayer) else type(module)
        for method in ("fuse", "reparameterize", "switch_to_deploy"):
            if callable(getattr(owner, method, None)):
                module.__dict__[method] = _FoldFirst(type(module).__name__, method)
