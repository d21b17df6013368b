"""Names that ENC layers and the subclasses of stock layers both use: the subclass's own attribute comes first."""

from __future__ import annotations

from typing import Any

from torch import nn


class YieldingAttribute:
    """Public name of one of an ENC layer's own attributes: a subclass's attribute of the same name comes first.

    Python itself looks into the instance's ``__dict__`` first, because this descriptor defines no ``__set__``.
    """

    def __init__(self, own: str, doc: str):
        self.own, self.__doc__ = own, doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: nn.Module | None, owner: type | None = None) -> Any:
        if layer is None:
            return self
        for registered in (layer._parameters, layer._buffers, layer._modules):
            if self.name in registered:
                return registered[self.name]
        return getattr(layer, self.own)


def lacks_attribute(layer: nn.Module, name: str) -> bool:
    """Whether a layer, stock or ENC, has no attribute ``name`` except the one that ENC layers define."""
    stores = (layer.__dict__, layer._parameters, layer._buffers, layer._modules)
    return not any(name in store for store in stores) and not hasattr(getattr(layer, "plain_class", type(layer)), name)
