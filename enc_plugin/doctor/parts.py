"""Checks of the type names in a config: whether they are registered, and whether the config imports the plugin."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import mmengine.registry
import mmpretrain.registry
from mmengine.config import Config
from mmengine.registry import Registry

from ..build import named_parts
from .finding import BROKEN, NOTE, OK, Result, quietly


def check_custom_imports(cfg: Config) -> Iterator[Result]:
    """Whether ``custom_imports`` imports the plugin if the config uses a part of it, other than by its full name."""
    imports = (cfg.get("custom_imports") or {}).get("imports", [])
    imports = [imports] if isinstance(imports, str) else imports
    own = {
        name
        for registry in _registries()
        for name, part in registry.module_dict.items()
        if getattr(part, "__module__", "").split(".")[0] == "enc_plugin"
    }
    used = sorted({name for _, name in named_parts(cfg.to_dict()) if name.split(".")[-1] in own})
    # mmengine imports the module of a full name.
    imports = imports if any(name.split(".")[0] != "enc_plugin" for name in used) else used
    names = ", ".join(used)
    if not used:
        yield NOTE, "this config uses no part of the plugin", "see the README: Use it"
    elif any(name.split(".")[0] == "enc_plugin" for name in imports):
        yield OK, f"the plugin, for {names}"
    else:
        found = f"the config uses {names} but does not import the plugin, so other tools report 'not in the registry'"
        yield BROKEN, found, 'add: custom_imports = dict(imports=["enc_plugin"])'


def check_types(cfg: Config) -> Iterator[Result]:
    """Whether each ``type`` of the config is in a registry."""
    for registry in _registries():
        quietly(registry.import_from_location)
    known = {name for registry in _registries() for name in registry.module_dict}
    for key, name in named_parts(cfg.to_dict()):
        if name.split(".")[-1] not in known:
            near = difflib.get_close_matches(name, known, n=3)
            advice = f"did you mean {' or '.join(near)}?" if near else "add its package to custom_imports"
            yield BROKEN, f"{key} = {name!r} is not in any registry", advice


def _registries() -> Iterator[Registry]:
    seen = set()
    roots = [*vars(mmengine.registry).values(), *vars(mmpretrain.registry).values()]
    while roots:
        registry = roots.pop()
        if isinstance(registry, Registry) and id(registry) not in seen:
            seen.add(id(registry))
            roots.extend(registry.children.values())
            yield registry
