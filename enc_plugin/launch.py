"""Runs mmpretrain's command-line tools with the plugin imported."""

from __future__ import annotations

from .installation import needs_mmpretrain  # noqa: F401

# isort: split
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import mmpretrain

from .build import config_file, load_config
from .engine.quiet import keep_traceback, shorten_terminal_log


def run_mmpretrain_tool(name: str) -> None:
    """Run mmpretrain's ``tools/<name>`` as the main program, with the command line of this process.

    The terminal shows the short log of :mod:`enc_plugin.engine.quiet`. If the run fails, its log file gets the
    traceback. The config, the first argument, may also be written as in ``_base_``: ``mmpretrain::resnet/...``.

    Args:
        name: File name of the tool, such as ``'train.py'``.

    Raises:
        FileNotFoundError: If this installation of mmpretrain has no tools, or there is no such config.
    """
    shorten_terminal_log()
    place = _place_of_config(sys.argv)
    if place is not None:
        sys.argv[place] = config_file(sys.argv[place])
        load_config(sys.argv[place])  # only for its errors, which are clearer than those of the tool
    package = Path(mmpretrain.__file__).parent
    places = (package / ".mim" / "tools" / name, package.parent / "tools" / name)  # wheel, checkout
    for path in places:
        if path.is_file():
            with keep_traceback():
                runpy.run_path(str(path), run_name="__main__")
            return
    raise FileNotFoundError(
        f"mmpretrain's tools/{name} was found neither at {places[0]} nor at {places[1]}; "
        "reinstall it: pip install --force-reinstall mmpretrain"
    )


def _place_of_config(arguments: Sequence[str]) -> int | None:
    """Index of the config on a command line: the first argument, else the first that looks like a config."""
    if len(arguments) > 1 and not arguments[1].startswith("-"):
        return 1
    looks = (i for i, x in enumerate(arguments[1:], 1) if "=" not in x and (x.endswith(".py") or "::" in x))
    return next(looks, None)
