"""Which class a config's ``type`` stands for, however it is written."""

from __future__ import annotations

from . import needs_mmengine  # noqa: F401

# isort: split
from collections.abc import Callable, Mapping

from mmengine.registry import Registry


def part_class(part: Mapping | str | Callable | None, registry: Registry) -> type | Callable | None:
    """The class (or function) of a part of a config.

    One part has many spellings: ``'CheckpointHook'``, ``'mmengine.CheckpointHook'`` (a scope),
    ``'mmengine.hooks.CheckpointHook'`` (where it is, as mmengine writes the copies of pure Python configs), or the
    class itself. So parts are compared by what the registry finds.

    Args:
        part: Config with a ``type``, or the type alone.
        registry: Where its kind of parts is registered, such as ``HOOKS``; looked into in the scope that is set.

    Returns:
        What would be built; None if there is no type, or nothing of this name.
    """
    kind = part.get("type") if isinstance(part, Mapping) else part
    if not isinstance(kind, str):
        return kind
    try:
        with registry.switch_scope_and_registry(None) as scoped:
            return scoped.get(kind)
    except Exception:  # mmengine imports what a full name says, with any error that this has
        return None
