"""Runs mmpretrain's own command-line tools with the plugin imported."""

from __future__ import annotations

from . import _needs_mmpretrain  # noqa: F401

# isort: split
import runpy
from pathlib import Path

import mmpretrain

from .engine.quiet import shorten_terminal_log


def run_mmpretrain_tool(name: str) -> None:
    """Run mmpretrain's ``tools/<name>`` as the main program, with the command line of this process.

    The terminal gets the short log of :mod:`enc_plugin.engine.quiet`.

    Args:
        name: File name of the tool, such as ``'train.py'``.

    Raises:
        FileNotFoundError: If this installation of mmpretrain carries no tools.
    """
    shorten_terminal_log()
    package = Path(mmpretrain.__file__).parent
    places = (package / ".mim" / "tools" / name, package.parent / "tools" / name)  # wheel, checkout
    for path in places:
        if path.is_file():
            runpy.run_path(str(path), run_name="__main__")
            return
    raise FileNotFoundError(
        f"mmpretrain's tools/{name} is at neither {places[0]} nor {places[1]}; "
        "reinstall it: pip install --force-reinstall mmpretrain"
    )
