"""What the environment check says about real broken environments: module search paths made by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import ROOT

# A process of its own in which some installed modules are hidden, or report another version.
SCRIPT = """
import importlib.metadata, importlib.util, sys
hidden, versions = {hidden!r}, {versions!r}
find_spec, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, *a: None if name in hidden else find_spec(name, *a)
def version_of(name):
    if name in versions and versions[name] is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return versions.get(name) or version(name)
importlib.metadata.version = version_of
import enc_plugin
"""
FORKS = ("onedl-mmengine", "onedl-mmcv", "onedl-mmpretrain")


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
def test_a_broken_environment_says_what_to_install(hidden, versions, message):
    script = SCRIPT.format(hidden=hidden, versions=dict.fromkeys(FORKS) | versions)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_a_package_beside_its_fork_is_warned_of():
    script = SCRIPT.format(hidden=[], versions={"mmengine": "0.10.7", "onedl-mmengine": "0.10.12"})
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "both mmengine and its fork onedl-mmengine are installed" in done.stderr
