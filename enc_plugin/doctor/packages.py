"""Whether the libraries are installed, in versions that work together, and can be imported."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

from ..installation import accepted, is_accepted, version_of
from ..refused import describe
from .finding import BROKEN, NOTE, OK, Finding, examine, quietly

# Distributions that bring each module; the onedl forks keep the modules' names, count their own versions, and check
# each other when they are imported.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "mmengine": ("mmengine", "mmengine-lite", "onedl-mmengine"),
    "mmcv": ("mmcv-lite", "mmcv", "mmcv-full", "onedl-mmcv", "onedl-mmcv-lite"),
    "mmpretrain": ("mmpretrain", "onedl-mmpretrain"),
}
_EXTRAS = ("timm", "safetensors", "tensorboard", "wandb", "mlflow")


def check_packages(torch_alone: bool) -> Iterator[Finding]:
    """Findings on torch alone, or on the whole stack."""
    for module in ("torch",) if torch_alone else _DISTRIBUTIONS:
        yield from examine(module, _package, module)
    if torch_alone:
        found = "not installed: layers, to_enc, fold, decay and enc_plugin.timm work; configs and other tools do not"
        advice = "pip install 'enc-plugin[lite]' for mmengine, mmpretrain and mmcv-lite"
        yield Finding("mmengine", NOTE, found, advice)
        return
    yield from examine("pkg_resources", _pkg_resources)
    yield from examine("opencv", _opencv)


def check_extras() -> Iterator[Finding]:
    """One finding on the optional libraries."""
    versions = {name: version_of(name) or version_of(f"{name}-skinny") for name in _EXTRAS}
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "none"
    missing = [name for name, version in versions.items() if not version]
    if missing:
        yield Finding(
            "extras",
            OK,
            f"{text}; not installed: {', '.join(missing)}",
            f"only if you want them: pip install {' '.join(missing)}",
        )
    else:
        yield Finding("extras", OK, text)


def _package(module: str) -> Iterator[Finding]:
    names = _DISTRIBUTIONS[module]
    found = {name: version for name in names if (version := version_of(name))}
    if len(found) > 1:
        text = " and ".join(f"{name} {version}" for name, version in found.items())
        remedy = f"pip uninstall -y {' '.join(found)}, then install one of them"
        yield Finding(module, BROKEN, f"{text} are both installed, and overwrite each other's files", remedy)
        return
    install = f"pip install '{names[0]}{accepted(module)}'"
    if not found:
        if importlib.util.find_spec(module) is None:
            yield Finding(module, BROKEN, "not installed", install)
            return
        found = {module: ""}  # from a source folder
    (name, version), *_ = found.items()
    text = f"{version} ({name})" if name != module else version or "from a source folder"
    if version and name in names[:2] and not is_accepted(module, version):
        install = f"pip install '{name}{accepted(module)}'"
        yield Finding(module, BROKEN, f"{text}; needed is {accepted(module)}", install)
        return
    try:
        quietly(importlib.import_module, module)
    except Exception as error:
        found_so = f"{text}, but importing it fails: {describe(error)}"
        yield Finding(module, BROKEN, found_so, _import_advice(error, install))
        return
    yield Finding(module, OK, text)


def _pkg_resources() -> Iterator[Finding]:
    setuptools = version_of("setuptools") or "none"
    try:
        quietly(importlib.import_module, "pkg_resources")
    except ImportError:
        found = f"missing (setuptools {setuptools}); mmengine needs it for 'mmpretrain::' base configs"
        yield Finding("pkg_resources", BROKEN, found, f"pip install 'setuptools{accepted('setuptools')}'")
        return
    yield Finding("pkg_resources", OK, f"of setuptools {setuptools}")


def _opencv() -> Iterator[Finding]:
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        advice = "pip install opencv-python-headless"
        if not isinstance(error, ModuleNotFoundError):  # libGL, libgthread
            advice = f"apt-get install libgl1 libglib2.0-0, or {advice} in place of opencv-python"
        yield Finding("opencv", BROKEN, describe(error), advice)
        return
    yield Finding("opencv", OK, cv2.__version__)


def _import_advice(error: Exception, install: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"pip install {error.name.split('.')[0]}"
    if "lib" in str(error) and ".so" in str(error):
        return "a system library or a build for another torch: reinstall it for this torch, or use mmcv-lite"
    return f"reinstall it: {install.replace('install', 'install --force-reinstall', 1)}"
