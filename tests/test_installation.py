"""What the environment check says about broken environments: modules that are hidden, or report another version."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from enc_plugin.installation import check_stack

FORKS = ("onedl-mmengine", "onedl-mmcv", "onedl-mmpretrain")


@pytest.fixture
def altered(monkeypatch):
    """Hides modules, and lets distributions report another version, or None: none is installed."""

    def alter(hidden: list[str], versions: dict[str, str | None]) -> None:
        find_spec, version = importlib.util.find_spec, importlib.metadata.version
        versions = dict.fromkeys(FORKS) | versions

        def version_of(name: str) -> str:
            if name in versions and versions[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions.get(name) or version(name)

        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name in hidden else find_spec(name, *a)
        )
        monkeypatch.setattr(importlib.metadata, "version", version_of)

    return alter


@pytest.mark.parametrize(
    ("hidden", "versions", "message"),
    [
        (["pkg_resources"], {}, "pip install 'setuptools<80.9'"),
        (["mmcv"], {}, "pip install 'enc-plugin[lite]' (or full mmcv)"),
        ([], {"mmcv": "2.5.1"}, "mmpretrain works with mmcv>=2.0,<2.4, found 2.5.1"),
        ([], {"mmcv": "1.7.0"}, "pip install 'mmcv>=2.0,<2.4'"),
        (
            ["mmcv"],
            {"onedl-mmengine": "0.10.12"},
            "needs mmcv, which is not installed; run: pip install 'enc-plugin[onedl]'",
        ),
        (
            [],
            {"mmcv": None, "mmcv-lite": None, "onedl-mmcv": "2.5.0"},
            "found 2.5.0; run: pip install 'onedl-mmcv>=2.3.6,<2.4'",
        ),
    ],
)
def test_a_broken_environment_says_what_to_install(altered, hidden, versions, message):
    altered(hidden, versions)
    with pytest.raises(ImportError, match=re.escape(message)):
        check_stack()


def test_a_package_beside_its_fork_is_warned_of(altered):
    altered([], {"mmengine": "0.10.7", "onedl-mmengine": "0.10.12"})
    with pytest.warns(UserWarning, match="both mmengine and its fork onedl-mmengine are installed"):
        check_stack()


def test_the_package_is_not_imported_in_a_broken_environment():
    script = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "mmcv" else find_spec(name, *a)
import enc_plugin
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install 'enc-plugin[" in done.stderr.splitlines()[-1]
