"""This installation: the folder of its configs and tools, the installed libraries and how to get others, and the cores.

``from .installation import needs_mmengine`` raises ``ImportError`` with the command to run if mmengine is missing or
incompatible; ``needs_mmpretrain`` does the same for mmpretrain and mmcv.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import os
import re
import warnings
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# Configs and tools are beside the package in a checkout, and within it in an installed wheel.
ROOT = _PACKAGE / ".mim" if (_PACKAGE / ".mim").is_dir() else _PACKAGE.parent
STACK = ("mmengine", "mmcv", "mmpretrain")  # the forks (onedl-mmengine, ...) have the same module names


def __getattr__(name: str) -> None:
    needed = {"needs_mmengine": STACK[:1], "needs_mmpretrain": ("mmengine", "mmpretrain", "mmcv")}
    if name not in needed:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require(*needed[name])


def config_path(name: str) -> str:
    """Absolute path of one of the package's configs, in an installed package and in a checkout.

    To inherit from one in your own config, write
    ``_base_ = __import__("enc_plugin").config_path("resnet50_enc_8xb32.py")``.

    Args:
        name: Path below ``configs/``, such as ``"digits/resnet8_enc-ws_1xb64.py"``; ``.py`` may be left out.

    Raises:
        FileNotFoundError: If there is no such config; lists similar names.
    """
    name = name if name.endswith(".py") else f"{name}.py"
    path = ROOT / "configs" / name
    if not path.is_file():
        known = [str(p.relative_to(ROOT / "configs")) for p in sorted((ROOT / "configs").rglob("*.py"))]
        near = difflib.get_close_matches(name, known, n=3) or known[:3]
        names = ", ".join(near)
        raise FileNotFoundError(f"config_path: there is no {name!r} in {ROOT / 'configs'}; similar names: {names}")
    return str(path)


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported, so it may be broken.

    A folder of that name without ``__init__.py`` (a namespace package) does not count: a checkout may lie in the
    working directory.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # an import hook hides the module
        return False
    except ValueError:  # the module is imported already, and was created without a spec
        return True
    return spec is not None and spec.origin is not None


def is_verbose() -> bool:
    """Whether the environment variable ``ENC_VERBOSE`` asks for all log lines and warnings on the terminal."""
    return os.environ.get("ENC_VERBOSE", "0") not in ("", "0")


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _requirements() -> dict[str, str]:
    """Accepted version ranges by distribution, from the package's metadata or the checkout's pyproject.toml."""
    try:
        lines = importlib.metadata.requires("enc-plugin") or []
    except importlib.metadata.PackageNotFoundError:
        source = ROOT / "pyproject.toml"
        lines = re.findall(r'"(.+?)"', source.read_text()) if source.is_file() else []
    found = (re.match(r"([\w.-]+)((?:[<>]=?[\d.]+,?)+)", line.replace(" ", "")) for line in lines)
    return {match[1]: ",".join(sorted(match[2].strip(",").split(","), reverse=True)) for match in found if match}


def accepted(distribution: str) -> str:
    """Version range of ``distribution`` that this package supports, such as ``'>=2.0,<2.4'``; ``''`` for any."""
    return _requirements().get({"mmcv": "mmcv-lite"}.get(distribution, distribution), "")


def is_accepted(distribution: str, version: str) -> bool:
    """Whether this package supports the given version of ``distribution``."""
    compare = {">=": tuple.__ge__, ">": tuple.__gt__, "<=": tuple.__le__, "<": tuple.__lt__}
    limits = re.findall(r"([<>]=?)([\d.]+)", accepted(distribution))
    return all(compare[sign](_numbers(version), _numbers(limit)) for sign, limit in limits)


def require(*packages: str) -> None:
    """Raise ``ImportError``, with the command to run, if one of ``packages`` is missing or the stack is incompatible.

    Args:
        *packages: Names from :data:`STACK`.
    """
    for package in packages:
        if not is_installed(package):
            raise ImportError(_missing(package), name=package)
    check_stack()


def check_stack() -> None:
    """Raise ``ImportError``, with the command to run, if the installed mmengine, mmcv and mmpretrain are incompatible.

    Missing packages are no error, because this package works with torch alone. The maintained forks
    (``onedl-mmengine``, ``onedl-mmcv``, ``onedl-mmpretrain``) are supported too. If a package and its fork are both
    installed, this warns, because both install the same files.
    """
    if not is_installed("mmengine"):
        return
    forks = _forks()
    for package in forks:
        original = next((n for n in (package, f"{package}-lite") if version_of(n) is not None), None)
        if original is not None:
            warnings.warn(
                f"both {original} and its fork onedl-{package} are installed, and one has overwritten files of the "
                f"other; run: pip uninstall {original} onedl-{package}, then install one of the two",
                stacklevel=2,
            )
    # mmengine imports pkg_resources; its fork does not.
    if "mmengine" not in forks and not is_installed("pkg_resources"):
        raise ImportError(
            "mmengine needs pkg_resources (for 'mmpretrain::' base configs), which setuptools 82 has removed; "
            f"run: pip install 'setuptools{accepted('setuptools')}'"
        )
    if is_installed("mmpretrain"):
        _check_mmcv(forks)


def _check_mmcv(forks: list[str]) -> None:
    """Raise ``ImportError`` unless there is an mmcv that mmpretrain accepts."""
    if not is_installed("mmcv"):
        raise ImportError(_missing("mmcv"), name="mmcv")
    version = next((v for name in ("mmcv", "mmcv-lite", "onedl-mmcv") if (v := version_of(name))), None)
    if version is not None and not is_accepted("mmcv", version):
        alternative = (
            f"'onedl-mmcv{accepted('onedl-mmcv')}'"
            if "mmcv" in forks
            else f"'mmcv{accepted('mmcv')}' (or the same range of mmcv-lite, without compiled operators)"
        )
        found = f"mmpretrain works with mmcv{accepted('mmcv')}, found {version}"
        raise ImportError(f"{found}; run: pip install {alternative}")


def _missing(package: str) -> str:
    forks = _forks()
    install = f"pip install 'enc-plugin[{'onedl' if forks else 'lite'}]'"
    if package == "mmcv" and not forks:
        install += " (or full mmcv)"
    return (
        f"this part of enc_plugin needs {package}, which is not installed; run: {install}. The equations "
        "(enc_plugin.functional), the ENC layers, to_enc, fold, audit, param_groups_enc and add_shift need only torch; "
        "enc_plugin.timm needs torch and timm"
    )


def _forks() -> list[str]:
    return [name for name in STACK if version_of(f"onedl-{name}") is not None]


def _numbers(version: str) -> tuple[int, ...]:
    """``'2.10.0+cpu'`` as ``(2, 10, 0)``."""
    numbers = [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))
