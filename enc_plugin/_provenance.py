"""What every reported number depends on: commit, versions, processor, threads."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# The forks with the same module names count too: a result says which were installed.
_PACKAGES = ("torch", "torchvision", "mmengine", "mmpretrain", "mmcv", "mmcv-lite")
_PACKAGES += ("onedl-mmengine", "onedl-mmpretrain", "onedl-mmcv", "timm", "numpy")


def provenance(root: str | Path) -> dict[str, object]:
    """Commit of the checkout at ``root`` (with ``-dirty`` if files differ), versions, processor and threads."""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "versions": versions,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
