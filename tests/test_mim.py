"""The installed wheel with the ecosystem's own tools: mmpretrain's train.py, which is what mim runs, and mim."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import mmpretrain
import pytest
from helpers import scalars
from test_package import wheel  # noqa: F401

STOCK_TRAIN = Path(mmpretrain.__file__).parent / ".mim" / "tools" / "train.py"
SHORT = ["--cfg-options", "train_cfg.max_epochs=1", "train_dataloader.dataset.indices=128"]
# A config of a user without a checkout, built on one of the package's.
OWN = '_base_ = __import__("enc_plugin").config_path("digits/resnet8_enc-ws_1xb64.py")\n'


@pytest.fixture(scope="module")
def user(wheel, tmp_path_factory):  # noqa: F811
    """A folder with a config, and the environment of a user who has installed the wheel and nothing else of ours."""
    folder = tmp_path_factory.mktemp("user")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    (folder / "own.py").write_text(OWN)
    env = os.environ | {"PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    return folder, env


def run(user, *command: str | Path) -> subprocess.CompletedProcess:
    folder, env = user
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def test_mmpretrains_own_tool_trains_a_config_on_top_of_the_packages(user):
    done = run(user, sys.executable, STOCK_TRAIN, "own.py", "--work-dir", "stock", *SHORT)
    assert "ENC: 10 layers (ws, alpha 1), 1 with a batch norm" in done.stdout
    assert any("accuracy/top1" in line for line in scalars(user[0] / "stock"))


@pytest.mark.slow
def test_the_installed_tools_run_from_any_folder(user):
    tools = user[0] / "site" / "enc_plugin" / ".mim" / "tools"
    done = run(user, sys.executable, tools / "train.py", "own.py", "--work-dir", "own", *SHORT)
    assert str(user[0] / "site") not in done.stderr
    done = run(user, sys.executable, tools / "doctor.py", "--quick", "--config", "own.py")
    assert f"{user[0] / 'site' / 'enc_plugin'}; its parts are registered" in done.stdout
    assert "10 layers (ws)" in done.stdout


@pytest.mark.slow
def test_mim_trains_a_config_on_top_of_the_packages(user):
    pytest.importorskip("mim")
    done = run(user, sys.executable, "-m", "mim", "train", "mmpretrain", "own.py", "--work-dir", "mim", *SHORT)
    assert "Training finished successfully" in done.stdout
    assert any("accuracy/top1" in line for line in scalars(user[0] / "mim"))
