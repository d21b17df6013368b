"""Tables of weights: what the kernels and the views of their results need to know, asked once and not in each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional import grouped

Stats = tuple[Tensor, Tensor]  # means, and inverse norms (or standard deviations), of rows or layers


class Table:
    """Addresses and shapes of weights, whose elements the kernels read where they are, and write one after the other.

    Args:
        weights: Float32 weights of one device, with whole rows (:func:`enc_plugin.functional.grouped.has_whole_rows`).
    """

    def __init__(self, weights: Sequence[Tensor]):
        self.shapes = [grouped.matrix_shape(weight) for weight in weights]
        self.places = [weight.data_ptr() for weight in weights]
        sizes = torch.tensor([weight.numel() for weight in weights], device="cpu")
        self.firsts: list[int] = (sizes.cumsum(0) - sizes).tolist()
        self.size = int(sizes.sum())
        self.device = weights[0].device
        self._views = [
            (weight.shape, weight.stride(), first) for weight, first in zip(weights, self.firsts, strict=True)
        ]
        self._scales: dict[tuple, Tensor] = {}

    def split(self, elements: Tensor) -> list[Tensor]:
        """Views of the elements of all weights, each with the shape and strides of its weight."""
        return [elements.as_strided(*view) for view in self._views]

    def scales(self, weights: Sequence[Tensor], variant: str, alphas: Sequence[float | Tensor]) -> Tensor:
        """:func:`enc_plugin.functional.grouped.factors` of the weights; kept if no alpha is learnable."""
        key = (variant, *alphas)
        if key in self._scales:
            return self._scales[key]
        found = grouped.factors(weights, variant, alphas)
        if not any(isinstance(alpha, Tensor) for alpha in alphas) and not grouped.is_recorded(found.device):
            self._scales[key] = found
        return found

    def pieces(self, lengths: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Addresses, lengths and offsets in the results of consecutive pieces of each weight, on the device.

        Args:
            lengths: Elements of the pieces of each weight.
        """
        parts = [torch.tensor(own, device="cpu") for own in lengths]
        starts = [own.cumsum(0) - own for own in parts]
        addresses = [place + 4 * start for place, start in zip(self.places, starts, strict=True)]
        offsets = [first + start for first, start in zip(self.firsts, starts, strict=True)]
        found = torch.cat(addresses), torch.cat(parts).to(torch.int32), torch.cat(offsets)
        return found[0].to(self.device), found[1].to(self.device), found[2].to(self.device)

    def computed(self, variant: str, dtype: torch.dtype, scale: Tensor) -> tuple[list[Tensor], Stats]:
        """The effective weights without autograd, and the statistics for :meth:`pulled_back`."""
        raise NotImplementedError

    def pulled_back(self, variant: str, scale: Tensor, stats: Stats, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients with respect to the elements and ``scale``, of the gradient of the elements of the results."""
        raise NotImplementedError
