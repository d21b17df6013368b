"""Stock layers whose weights the optimizer keeps on the constraint set, and how a network marks them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn

from ..functional.normalizable import check_normalizable
from ..layers import ENCLayer


@dataclass(frozen=True)
class Projected:
    """A stock layer that is ENC by projection, with the attributes of an ENC layer: its weight is the effective one."""

    layer: nn.Module
    enc_variant: str
    enc_alpha: float

    # Attributes that only some ENC layers set.
    enc_log_alpha: ClassVar[None] = None
    enc_kept: ClassVar[None] = None
    enc_norm: ClassVar[None] = None

    @property
    def weight(self) -> Tensor:
        """The weight. It is on the constraint set from the first optimizer step on."""
        return cast(Tensor, self.layer.weight)

    enc_free_weight = weight
    effective_weight = weight


def make_projected(layer: ENCLayer) -> None:
    """Leave the constraint of an ENC layer to the optimizer, in place, by a mark that parameter groups and audits see.

    The layer becomes the stock layer with the free weight. A layer that owns a batch norm keeps its class, because the
    stock class has no place for the batch norm.
    """
    mark = (layer.enc_variant, float(layer.enc_alpha))
    if layer.enc_norm is None:
        layer.become_stock()
    else:
        layer.enc_is_projected = True
    layer.enc_projected = mark


def projection_of(layer: nn.Module) -> Projected | None:
    """The layer as :class:`Projected` if :func:`make_projected` has marked it, else None."""
    found = layer.__dict__.get("enc_projected")
    return None if found is None else Projected(layer, *found)


def projected_layers(model: nn.Module) -> Iterator[tuple[str, Projected]]:
    """The marked layers of ``model`` with their qualified names, in module order."""
    for name, module in model.named_modules():
        if (found := projection_of(module)) is not None:
            yield name, found


def check_projectable(model: nn.Module) -> None:
    """Raise ``ValueError`` if a marked layer computes its weight from another tensor (pruned or parametrized)."""
    for name, found in projected_layers(model):
        if "weight" not in found.layer._parameters:
            raise ValueError(
                f"layer {name!r}: its weight is pruned or parametrized, so it is computed from another tensor and "
                "the optimizer cannot project it; use to_enc with how='reparametrize' for this layer"
            )


def constrained_layers(model: nn.Module) -> Iterator[tuple[str, ENCLayer | Projected]]:
    """The layers of ``model`` that obey eq. 19, by reparameterization or by projection, in module order."""
    for name, module in model.named_modules():
        found = module if isinstance(module, ENCLayer) else projection_of(module)
        if found is not None:
            yield name, found


def check_constrained(model: nn.Module) -> None:
    """Raise ``ValueError``, naming the layer, if a weight of :func:`constrained_layers` cannot be normalised."""
    for name, layer in constrained_layers(model):
        check_normalizable(name, layer.enc_free_weight, layer.enc_variant, layer.enc_kept)


def unmark(model: nn.Module) -> None:
    """Remove the marks of ``model``: optimizers that are made from now on leave these weights unconstrained."""
    for _, found in projected_layers(model):
        del found.layer.enc_projected
