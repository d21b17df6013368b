"""Where the package's configs and tools are: beside it in a checkout, within it once it is installed."""

from __future__ import annotations

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE / ".mim" if (_PACKAGE / ".mim").is_dir() else _PACKAGE.parent


def config_path(name: str) -> str:
    """Path of one of the package's configs, from an installed package as from a checkout.

    mmengine evaluates what ``_base_`` is set to, so that a config anywhere can build on these:
    ``_base_ = __import__("enc_plugin").config_path("resnet50_enc_8xb32.py")``.

    Args:
        name: Path below ``configs/``, such as ``"digits/resnet8_enc-ws_1xb64.py"``; the ending may be left out.

    Returns:
        The absolute path.

    Raises:
        FileNotFoundError: If there is no such config; names the nearest ones.
    """
    name = name if name.endswith(".py") else f"{name}.py"
    path = ROOT / "configs" / name
    if not path.is_file():
        known = [str(p.relative_to(ROOT / "configs")) for p in sorted((ROOT / "configs").rglob("*.py"))]
        near = difflib.get_close_matches(name, known, n=3) or known[:3]
        raise FileNotFoundError(f"config_path: there is no {name!r} in {ROOT / 'configs'}; near it: {', '.join(near)}")
    return str(path)
