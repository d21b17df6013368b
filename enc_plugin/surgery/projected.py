"""Stock layers whose weights an optimizer holds on the constraint set: how a network says which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn

from ..layers import ENCLayer


@dataclass(frozen=True)
class Projected:
    """A stock layer that is ENC by projection, seen as an ENC layer: its weight is the effective one."""

    layer: nn.Module
    enc_variant: str
    enc_alpha: float

    # An ENC layer may have these.
    enc_log_alpha: ClassVar[None] = None
    enc_kept: ClassVar[None] = None
    enc_norm: ClassVar[None] = None

    @property
    def weight(self) -> Tensor:
        """The weight, on the constraint set once training has begun."""
        return cast(Tensor, self.layer.weight)

    @property
    def type_name(self) -> str:
        """Name of the layer's class."""
        return type(self.layer).__name__

    enc_free_weight = weight
    effective_weight = weight


def make_projected(layer: ENCLayer) -> None:
    """Leave the constraint of an ENC layer to the optimizer, in place: parameter groups, audits and monitors see that.

    The layer becomes the stock layer, with the free weight; one that owns a batch norm keeps its class for that.
    """
    mark = (layer.enc_variant, float(layer.enc_alpha))
    if layer.enc_norm is None:
        layer.become_stock()
    else:
        layer.enc_is_projected = True
    layer.enc_projected = mark


def projection_of(layer: nn.Module) -> Projected | None:
    """The layer as :func:`make_projected` has marked it, or None."""
    found = layer.__dict__.get("enc_projected")
    return None if found is None else Projected(layer, *found)


def projected_layers(model: nn.Module) -> Iterator[tuple[str, Projected]]:
    """The marked layers of ``model`` with their qualified names, in module order."""
    for name, module in model.named_modules():
        if (found := projection_of(module)) is not None:
            yield name, found


def constrained_layers(model: nn.Module) -> Iterator[tuple[str, ENCLayer | Projected]]:
    """The layers of ``model`` for which eq. 19 holds, by reparameterization or by projection, in module order."""
    for name, module in model.named_modules():
        found = module if isinstance(module, ENCLayer) else projection_of(module)
        if found is not None:
            yield name, found


def unmark(model: nn.Module) -> None:
    """Make the projected layers of ``model`` plain ones: no optimizer that is made from now on holds their weights."""
    for _, found in projected_layers(model):
        del found.layer.enc_projected
