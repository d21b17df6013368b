"""Load hooks that stay with copies of an optimizer: torch leaves all hooks out of copies and pickles."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim.optimizer import Optimizer

LoadHook = Callable[[Optimizer, dict[str, Any]], dict[str, Any] | None]


def carry_load_hook(
    optimizer: Optimizer, hook: LoadHook, before_copy: Callable[[Optimizer], None] = lambda _: None
) -> None:
    """Call ``hook`` before a state is loaded into the optimizer, or into a copy of it.

    A pickled optimizer names the hook's module. So that module is imported where the optimizer is unpickled, together
    with the step hook that it registers for all optimizers of a process. An optimizer without torch's hooks is left
    alone. Repeated calls change nothing.

    Args:
        optimizer: Any torch optimizer.
        hook: A function of a module, as for ``Optimizer.register_load_state_dict_pre_hook``.
        before_copy: Called with the optimizer before it is copied.
    """
    hooks = getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None)
    if hooks is None:
        return
    if hook not in hooks.values():  # a copy has it already
        optimizer.register_load_state_dict_pre_hook(hook)
    vars(optimizer).setdefault("_enc_carried", {})[hook] = before_copy
    optimizer.__getstate__ = partial(_state_of_copies, weakref.ref(optimizer))


def _state_of_copies(original: weakref.ref[Optimizer]) -> dict[str, Any]:
    """State of an optimizer for ``copy`` and ``pickle``, with the load hooks that it carries."""
    optimizer = original()
    for before_copy in optimizer._enc_carried.values():
        before_copy(optimizer)
    # Negative ids cannot collide, because torch numbers its hooks from 0.
    hooks = OrderedDict((-1 - i, hook) for i, hook in enumerate(optimizer._enc_carried))
    return {**type(optimizer).__getstate__(optimizer), "_optimizer_load_state_dict_pre_hooks": hooks}
