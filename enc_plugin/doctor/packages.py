"""Checks that the libraries are installed, have versions that work together, and can be imported."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

from ..installation import accepted, is_accepted, version_of
from ..refused import describe
from .finding import BROKEN, NOTE, OK, Finding, Result, examine, quietly

# Distributions of each module. The versions of the onedl forks are not checked here: they have their own numbering, and
# they check each other on import.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "mmengine": ("mmengine", "mmengine-lite", "onedl-mmengine"),
    "mmcv": ("mmcv-lite", "mmcv", "mmcv-full", "onedl-mmcv", "onedl-mmcv-lite"),
    "mmpretrain": ("mmpretrain", "onedl-mmpretrain"),
}
_EXTRAS = ("timm", "safetensors", "tensorboard", "wandb", "mlflow")


def check_packages(torch_alone: bool) -> Iterator[Finding]:
    """Check torch alone, or all libraries that training needs."""
    for module in ("torch",) if torch_alone else _DISTRIBUTIONS:
        yield from examine(module, _package, module)
    if torch_alone:
        found = "not installed: layers, to_enc, fold, weight decay and enc_plugin.timm work; configs and tools do not"
        advice = "pip install 'enc-plugin[lite]' for mmengine, mmpretrain and mmcv-lite"
        yield Finding("mmengine", NOTE, found, advice)
        return
    yield from examine("pkg_resources", _pkg_resources)
    yield from examine("opencv", _opencv)


def check_extras() -> Iterator[Finding]:
    """List the optional libraries in one finding."""
    versions = {name: version_of(name) or version_of(f"{name}-skinny") for name in _EXTRAS}
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "none"
    missing = [name for name, version in versions.items() if not version]
    advice = ""
    if missing:
        text += f"; not installed: {', '.join(missing)}"
        advice = f"if you want to use them: pip install {' '.join(missing)}"
    yield Finding("extras", OK, text, advice)


def _package(module: str) -> Iterator[Result]:
    names = _DISTRIBUTIONS[module]
    found = {name: version for name in names if (version := version_of(name))}
    if len(found) > 1:
        text = " and ".join(f"{name} {version}" for name, version in found.items())
        advice = f"pip uninstall -y {' '.join(found)}, then install one of them"
        yield BROKEN, f"{text} are both installed and overwrite each other's files", advice
        return
    install = f"pip install '{names[0]}{accepted(module)}'"
    if not found:
        if importlib.util.find_spec(module) is None:
            yield BROKEN, "not installed", install
            return
        found = {module: ""}
    (name, version), *_ = found.items()
    text = f"{version} ({name})" if name != module else version or "from a source folder"
    if version and name in names[:2] and not is_accepted(module, version):
        install = f"pip install '{name}{accepted(module)}'"
        yield BROKEN, f"{text}; required: {accepted(module)}", install
        return
    try:
        quietly(importlib.import_module, module)
    except Exception as error:
        yield BROKEN, f"{text}, but importing it fails: {describe(error)}", _import_advice(error, install)
        return
    yield OK, text


def _pkg_resources() -> Iterator[Result]:
    setuptools = version_of("setuptools") or "none"
    try:
        quietly(importlib.import_module, "pkg_resources")
    except ImportError:
        found = f"missing (setuptools {setuptools}); mmengine needs it for 'mmpretrain::' base configs"
        yield BROKEN, found, f"pip install 'setuptools{accepted('setuptools')}'"
        return
    yield OK, f"from setuptools {setuptools}"


def _opencv() -> Iterator[Result]:
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        advice = "pip install opencv-python-headless"
        if not isinstance(error, ModuleNotFoundError):  # libGL, libgthread
            advice = f"apt-get install libgl1 libglib2.0-0, or {advice} instead of opencv-python"
        yield BROKEN, describe(error), advice
        return
    yield OK, cv2.__version__


def _import_advice(error: Exception, install: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"pip install {error.name.split('.')[0]}"
    if "lib" in str(error) and ".so" in str(error):
        return "a system library is missing or built for another torch: reinstall it for this torch, or use mmcv-lite"
    return f"reinstall it: {install.replace('install', 'install --force-reinstall', 1)}"
