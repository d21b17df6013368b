"""The wheel is complete: a plugin installed from it finds its own configs, tools and model index."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_carries_configs_tools_and_the_model_index(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "tools"):
        files = [path for path in (ROOT / folder).rglob("*.*") if "__pycache__" not in path.parts]
        missing = [p for p in files if f"enc_plugin/.mim/{p.relative_to(ROOT)}" not in names]
        assert files
        assert not missing
    assert "enc_plugin/.mim/model-index.yml" in names
    assert not [name for name in names if name.startswith(("tests", "lab", "data", "work_dirs"))]


def test_an_installed_plugin_builds_from_its_own_configs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "from pathlib import Path; import enc_plugin; from mmengine.config import Config; "
        "from mmpretrain.registry import MODELS; package = Path(enc_plugin.__file__).parent; "
        "cfg = Config.fromfile(package / '.mim/configs/digits/resnet8_enc-ws_1xb64.py'); "
        "print(package, len(MODELS.build(cfg.model).enc_report))"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    # The last line: the forks of the stack print some of their own.
    assert done.stdout.splitlines()[-1].split() == [str(tmp_path / "enc_plugin"), "10"], done.stderr
