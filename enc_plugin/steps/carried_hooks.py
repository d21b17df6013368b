"""Load hooks that stay with copies of an optimizer: torch leaves all hooks out of copies and pickles."""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import Optimizer

LoadHook = Callable[[Optimizer, dict[str, Any]], dict[str, Any] | None]

_before_copy: dict[LoadHook, Callable[[Optimizer], None]] = {}


def register_carried_hook(hook: LoadHook, before_copy: Callable[[Optimizer], None]) -> None:
    """Make copies of optimizers keep a load hook. A module calls this for its own function when it is imported.

    A pickled optimizer names that function. So the module is imported where the optimizer is unpickled, together with
    the step hook that it registers for all optimizers of a process.

    Args:
        hook: A function of a module, as for ``Optimizer.register_load_state_dict_pre_hook``.
        before_copy: Called with an optimizer that has the hook, before it is copied.
    """
    _before_copy[hook] = before_copy


def carry_load_hook(optimizer: Optimizer, hook: LoadHook) -> None:
    """Call a registered ``hook`` before a state is loaded into the optimizer, a copy of it, a copy of that, and so on.

    An optimizer without torch's hooks is left alone. Repeated calls change nothing.
    """
    hooks = getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None)
    if hooks is not None and hook not in hooks.values():
        optimizer.register_load_state_dict_pre_hook(hook)
        copyreg.pickle(type(optimizer), _reduce)  # copy and pickle call it for optimizers of this class


def _reduce(optimizer: Optimizer) -> str | tuple:
    """What ``copy`` and ``pickle`` make a copy of an optimizer from: its state, and the load hooks that it carries."""
    hooks = getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", {}).values()
    carried = [hook for hook in hooks if hook in _before_copy]
    if not carried:
        return optimizer.__reduce_ex__(4)
    for hook in carried:
        _before_copy[hook](optimizer)
    # Negative ids cannot collide, because torch numbers its hooks from 0.
    kept = OrderedDict((-1 - i, hook) for i, hook in enumerate(carried))
    return _empty, (type(optimizer),), {**optimizer.__getstate__(), "_optimizer_load_state_dict_pre_hooks": kept}


def _empty(cls: type[Optimizer]) -> Optimizer:
    """An optimizer without a state. The process that unpickles it may not have met its class yet."""
    copyreg.pickle(cls, _reduce)
    return cls.__new__(cls)
