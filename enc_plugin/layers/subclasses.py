"""ENC classes of subclasses of torch's layers (mmcv's wrappers, timm's ``Conv2dSame``, ...), created at run time."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import Tensor, nn

from .attributes import lacks_attribute
from .enc_layer import PUBLIC, ENCLayer
from .stock import ENC_LAYERS, LinearPostNorm

# Names that a subclass may use for something else. Internal code uses another name for each of them.
_YIELDING = (*PUBLIC, "fuse")
# Names that an ENC class takes from every subclass, whose own methods run all the same: by `forward_with` and super().
_TAKEN = ("_conv_forward", "reset_parameters")


class _ENCSubclass(ENCLayer):
    """Base of the ENC classes that :func:`enc_class` derives from subclasses of the stock layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the forward of the stock class with the effective weight, then the post-norm if there is one."""
        return self._post_norm(self.forward_with(self._weight(), *args, **kwargs))

    def forward_with(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the forward of the stock class with ``weight`` instead of the layer's weight."""
        # The stock forward gets the module that fold() would return: an object of the stock class with the same
        # attributes and another weight. (In a pruned layer, `weight` is an entry of __dict__.)
        state = {key: value for key, value in self.__dict__.items() if key != "weight"}
        state["_parameters"] = {**self._parameters, "weight": weight}
        state["_modules"] = {key: value for key, value in self._modules.items() if key != self._enc_norm_name}
        stock = object.__new__(self.plain_class)
        stock.__dict__ = dict(state)
        out: Tensor = self.plain_class.forward(stock, *args, **kwargs)
        for key, value in stock.__dict__.items():
            if value is not state.get(key):  # set by the stock forward
                self.__dict__[key] = value
        return out

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle cannot import a class created at run time, so the class is created again from the stock class.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # Python 3.10 has no default
        return _new_subclass_layer, (self.plain_class,), state


class _ENCSubclassLinear(_ENCSubclass, LinearPostNorm):
    pass


def enc_class(plain_class: type[nn.Module]) -> type[ENCLayer] | None:
    """The ENC class of a stock layer class or of a subclass of one; None for other classes.

    A subclass (mmcv's wrappers, timm's ``Conv2dSame``, ...) keeps its forward, which runs with the effective weight.
    """
    cls: Any = plain_class  # mypy does not treat type[nn.Module] as hashable
    return ENC_LAYERS.get(cls) or _derive_enc_class(cls)


def reserved_attributes(layer: nn.Module) -> list[str]:
    """Attributes of ``layer`` with names that the ENC class needs, and for which it has no alternative name."""
    own = [cls for cls in _ENCSubclass.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    defined = (name for cls in reversed(own) for name in vars(cls) if not hasattr(nn.Module, name))
    taken = [name for name in defined if name not in (*_YIELDING, *_TAKEN) and not lacks_attribute(layer, name)]
    has_extra_state = type(layer).get_extra_state is not nn.Module.get_extra_state
    return taken + ["get_extra_state"] * has_extra_state


@cache
def _derive_enc_class(plain_class: type[Any]) -> type[ENCLayer] | None:
    stock = next((base for base in ENC_LAYERS if issubclass(plain_class, base)), None)
    if stock is None or issubclass(plain_class, ENCLayer):
        return None
    own = _ENCSubclassLinear if stock is nn.Linear else _ENCSubclass
    # Public names that the subclass defines keep the subclass's meaning.
    kept = {name: inspect.getattr_static(plain_class, name) for name in _YIELDING if hasattr(plain_class, name)}
    # Its bases become direct bases too, for mmengine's initialisers (see stock.py). Python refuses Generic as one.
    bases = (base for base in plain_class.__bases__ if issubclass(base, nn.Module))
    return type(
        f"ENC{plain_class.__name__}",
        (own, plain_class, *bases),
        {
            **kept,
            "plain_class": plain_class,
            "norm_class": ENC_LAYERS[stock].norm_class,
            "__doc__": f":class:`{plain_class.__module__}.{plain_class.__qualname__}` with an ENC weight.",
            "__module__": __name__,
        },
    )


def _new_subclass_layer(plain_class: type[nn.Module]) -> nn.Module:
    return object.__new__(enc_class(plain_class) or plain_class)
