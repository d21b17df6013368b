"""Attribute names that both ENC layers and subclasses of stock layers may use; the subclass takes precedence."""

from __future__ import annotations

from typing import Any

from torch import nn


class YieldingAttribute:
    """Public alias of an attribute of ENC layers. An attribute of a subclass with the same name takes precedence.

    Entries of the instance's ``__dict__`` also take precedence, because this descriptor has no ``__set__``.
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
    """Whether ``layer`` has no attribute ``name``, apart from the one that ENC layers define."""
    stores = (layer.__dict__, layer._parameters, layer._buffers, layer._modules)
    return not any(name in store for store in stores) and not hasattr(getattr(layer, "plain_class", type(layer)), name)
