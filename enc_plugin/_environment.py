"""Checks what the OpenMMLab stack needs before its own imports fail with a message that helps nobody."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings

MMCV_RANGE = ((2, 0), (2, 4))  # what mmpretrain 1.2 accepts: 2.0 <= mmcv < 2.4
PACKAGES = ("mmengine", "mmcv", "mmpretrain")  # the forks have the same modules: onedl-mmengine, ...


def check_environment() -> None:
    """Raise ``ImportError`` that says what to install if mmengine, mmcv or mmpretrain cannot work here.

    The maintained forks (``onedl-mmengine``, ``onedl-mmcv``, ``onedl-mmpretrain``) do as well. A package beside its
    fork is warned of: both write the same files.
    """
    forks = [name for name in PACKAGES if _version(f"onedl-{name}") is not None]
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            extra = "onedl" if forks else "lite"
            install = f"pip install 'enc-plugin[{extra}]'"
            if package == "mmcv" and not forks:
                install += " (or full mmcv)"
            raise ImportError(f"enc_plugin needs {package}, which is not installed; run: {install}")
    for package in forks:
        twin = next((n for n in (package, f"{package}-lite") if _version(n) is not None), None)
        if twin is not None:
            warnings.warn(
                f"both {twin} and its fork onedl-{package} are installed, and each has overwritten files of the other; "
                f"run: pip uninstall {twin} onedl-{package}, then install one of the two",
                stacklevel=2,
            )
    # mmengine itself needs it; its fork does not.
    if "mmengine" not in forks and importlib.util.find_spec("pkg_resources") is None:
        raise ImportError(
            "mmengine needs pkg_resources (for 'mmpretrain::' base configs), which setuptools 82 and later no longer "
            "has; run: pip install 'setuptools<80.9'"
        )
    version = mmcv_version()
    if version is not None and not MMCV_RANGE[0] <= version < MMCV_RANGE[1]:
        low, high = (".".join(map(str, v)) for v in MMCV_RANGE)
        alternative = (
            f"'onedl-mmcv>={low},<{high}'"
            if "mmcv" in forks
            else f"'mmcv>={low},<{high}' (or the same range of mmcv-lite, without compiled operators)"
        )
        raise ImportError(
            f"mmpretrain works with {low} <= mmcv < {high}, found {'.'.join(map(str, version))}; "
            f"run: pip install {alternative}"
        )


def mmcv_version() -> tuple[int, ...] | None:
    """(major, minor) of mmcv, mmcv-lite or onedl-mmcv, whichever is installed; None if none says."""
    for name in ("mmcv", "mmcv-lite", "onedl-mmcv"):
        text = _version(name)
        if text is not None:
            return tuple(int(part) for part in text.split(".")[:2])
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
