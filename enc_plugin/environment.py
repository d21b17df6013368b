"""What of the OpenMMLab stack is installed, and errors that say what to install where mmengine's own would not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings

MMCV_RANGE = ((2, 0), (2, 4))  # what mmpretrain 1.2 accepts: 2.0 <= mmcv < 2.4
PACKAGES = ("mmengine", "mmcv", "mmpretrain")  # the forks have the same modules: onedl-mmengine, ...


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported, and may be broken.

    A folder of that name without ``__init__.py`` is none: Python finds it as a namespace package, say where a checkout
    lies beside the working directory.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # an import hook that hides it
        return False
    except ValueError:  # made by hand, without a spec, and imported already
        return True
    return spec is not None and spec.origin is not None


def require(*packages: str) -> None:
    """Raise ``ImportError`` that names the extra if one of ``packages`` is missing, or if the stack cannot work here.

    Args:
        *packages: Of :data:`PACKAGES`.
    """
    for package in packages:
        if not is_installed(package):
            raise ImportError(_missing(package), name=package)
    check_environment()


def check_environment() -> None:
    """Raise ``ImportError`` that says what to do if what is installed of mmengine, mmcv and mmpretrain cannot work.

    What is not installed is no error: the package works with torch alone. The maintained forks (``onedl-mmengine``,
    ``onedl-mmcv``, ``onedl-mmpretrain``) do as well. A package beside its fork is warned of: both write the same files.
    """
    if not is_installed("mmengine"):
        return
    forks = _forks()
    for package in forks:
        twin = next((n for n in (package, f"{package}-lite") if _version(n) is not None), None)
        if twin is not None:
            warnings.warn(
                f"both {twin} and its fork onedl-{package} are installed, and each has overwritten files of the other; "
                f"run: pip uninstall {twin} onedl-{package}, then install one of the two",
                stacklevel=2,
            )
    # mmengine itself needs it; its fork does not.
    if "mmengine" not in forks and not is_installed("pkg_resources"):
        raise ImportError(
            "mmengine needs pkg_resources (for 'mmpretrain::' base configs), which setuptools 82 and later no longer "
            "has; run: pip install 'setuptools<80.9'"
        )
    if is_installed("mmpretrain"):
        _check_mmcv(forks)


def _check_mmcv(forks: list[str]) -> None:
    """Raise ``ImportError`` unless there is an mmcv that mmpretrain accepts."""
    if not is_installed("mmcv"):
        raise ImportError(_missing("mmcv"), name="mmcv")
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


def _missing(package: str) -> str:
    forks = _forks()
    install = f"pip install 'enc-plugin[{'onedl' if forks else 'lite'}]'"
    if package == "mmcv" and not forks:
        install += " (or full mmcv)"
    return (
        f"this part of enc_plugin needs {package}, which is not installed; run: {install}. With torch alone there are "
        "the equations (enc_plugin.functional), the ENC layers, to_enc, fold, audit, param_groups_enc and add_shift, "
        "with timm enc_plugin.timm"
    )


def _forks() -> list[str]:
    return [name for name in PACKAGES if _version(f"onedl-{name}") is not None]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
