"""Checks what the OpenMMLab stack needs before its own imports fail with a message that helps nobody."""

from __future__ import annotations

import importlib.metadata
import importlib.util

MMCV_RANGE = ((2, 0), (2, 4))  # what mmpretrain 1.2 accepts: 2.0 <= mmcv < 2.4


def check_environment() -> None:
    """Raise ``ImportError`` that says what to install if mmengine, mmcv or mmpretrain cannot work here."""
    for package in ("mmengine", "mmcv", "mmpretrain"):
        if importlib.util.find_spec(package) is None:
            install = "pip install 'enc-plugin[lite]' (or full mmcv)" if package == "mmcv" else f"pip install {package}"
            raise ImportError(f"enc_plugin needs {package}, which is not installed; run: {install}")
    if importlib.util.find_spec("pkg_resources") is None:
        raise ImportError(
            "mmengine needs pkg_resources (for 'mmpretrain::' base configs), which setuptools 82 and later no longer "
            "has; run: pip install 'setuptools<80.9'"
        )
    version = mmcv_version()
    if version is not None and not MMCV_RANGE[0] <= version < MMCV_RANGE[1]:
        low, high = (".".join(map(str, v)) for v in MMCV_RANGE)
        raise ImportError(
            f"mmpretrain works with {low} <= mmcv < {high}, found {'.'.join(map(str, version))}; "
            f"run: pip install 'mmcv>={low},<{high}' (or the same range of mmcv-lite, without compiled operators)"
        )


def mmcv_version() -> tuple[int, ...] | None:
    """(major, minor) of mmcv or mmcv-lite, whichever is installed; None if neither says."""
    for name in ("mmcv", "mmcv-lite"):
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in text.split(".")[:2])
    return None
