"""Provenance of a reported number: commit, versions, processor with its settings, and the GPU with its settings."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from enc_plugin.functional.precision import float32_formats
from enc_plugin.installation import version_of

# Includes the forks that have the same module names.
_PACKAGES = ("torch", "torchvision", "mmengine", "mmpretrain", "mmcv", "mmcv-lite")
_PACKAGES += ("onedl-mmengine", "onedl-mmpretrain", "onedl-mmcv", "timm", "numpy")
_CODE = (".py", ".toml", ".txt", ".sh")


def provenance(root: str | Path) -> dict[str, object]:
    """Commit of the checkout at ``root`` (``-dirty`` if its code differs), versions, processor, settings, GPU."""
    # A copy of a checkout may have no git history.
    commit = _git(root, "rev-parse", "--short=12", "HEAD") or os.environ.get("ENC_COMMIT", "")[:12]
    # Only code counts as dirty; changed results and pages do not.
    if any(name.endswith(_CODE) for name in _git(root, "diff", "--name-only", "HEAD").splitlines()):
        commit += "-dirty"
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "versions": {package: found for package in _PACKAGES if (found := version_of(package))},
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "denormals": "flushed" if torch.tensor(1e-40).mul(1).item() == 0 else "kept",
        **gpu(),
    }


def gpu() -> dict[str, dict[str, object]]:
    """Name, driver, libraries and settings of the current CUDA device under the key ``gpu``; empty without a device."""
    if not torch.cuda.is_available():
        return {}
    return {
        "gpu": {
            "name": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "float32": float32_formats(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
    }


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or "unknown"


def _git(root: str | Path, *arguments: str) -> str:
    return _output("git", "-C", str(root), *arguments)


def _output(*command: str) -> str:
    """Output of a command; empty if it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
