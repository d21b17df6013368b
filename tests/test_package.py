"""The installed wheel: it is complete, and each tool that it ships runs from it where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import mmpretrain
import numpy as np
import pytest
import torch
from helpers import ROOT, free_port, scalars

from enc_plugin.datasets.cifar10 import CLASSES

STOCK_TRAIN = Path(mmpretrain.__file__).parent / ".mim" / "tools" / "train.py"
SHORT = ["--cfg-options", "train_cfg.max_epochs=1", "train_dataloader.dataset.indices=128"]
# A config of a user without a checkout, built on one of the package's; a run's copy of it names the package.
OWN = """
_base_ = __import__("enc_plugin").config_path("digits/resnet8_enc-ws_1xb64.py")
package = __import__("enc_plugin").__file__
"""
# Several tools one after the other in one process, since importing the package takes longer than most of them.
IN_TURN = """
import runpy, sys
folder, *commands = sys.argv[1:]
sys.path[0] = folder  # as it is for a script there
for command in commands:
    tool, *sys.argv[1:] = command.split()
    sys.argv[0] = f"{folder}/{tool}"
    print(f"$ {command}")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print(end.code)
import enc_plugin
print(enc_plugin.__file__)
"""

# Starts one task, without its options (-p PARTITION, -x NODES, --name=value).
SRUN = """#!/usr/bin/env bash
echo "srun $*"
while [[ $1 == -* ]]; do [[ $1 == -? ]] && shift; shift; done
exec "$@"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source distribution, so that both are complete."""
    out = tmp_path_factory.mktemp("dist")
    code = "import sys, hatchling.build; hatchling.build.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, check=True, timeout=240)
    pip("wheel", "--no-build-isolation", "-w", out, next(out.glob("*.tar.gz")))
    return next(out.glob("*.whl"))


def pip(command: str, *arguments) -> None:
    command = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


class User:
    """A folder with a config, and the environment of a user who has installed the wheel and nothing else of ours."""

    def __init__(self, folder: Path, wheel: Path):
        self.folder, self.package = folder, folder / "site" / "enc_plugin"
        self.tools = self.package / ".mim" / "tools"
        pip("install", "--target", folder / "site", wheel)
        (folder / "own.py").write_text(OWN)

    def run(self, *command: str | Path, code: int = 0, **env: str) -> str:
        """What the command prints; it must end with ``code``."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"PYTHONPATH": str(self.folder / "site"), "OMP_NUM_THREADS": "1", "PATH": path}
        env = os.environ | own | {"PORT": str(free_port())} | env
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    def ran_from_the_wheel(self, work_dir: str) -> bool:
        """Whether a run's copy of the config names the installed package."""
        line = f"package = '{self.package}/__init__.py'"
        return any(line in path.read_text() for path in self.folder.glob(f"{work_dir}/*.py"))


@pytest.fixture(scope="module")
def user(wheel, tmp_path_factory):
    return User(tmp_path_factory.mktemp("user"), wheel)


@pytest.fixture(scope="module")
def ran(user):
    """What each of the tools printed, by its name; they make a run, and measure it."""
    with zipfile.ZipFile(user.folder / "few.zip", "w") as archive:
        archive.writestr("train/cat/0.png", b"")
    commands = {
        "train": ["own.py", "--work-dir", "run", *SHORT],
        "test": ["own.py", "run/epoch_1.pth", "--work-dir", "tested"],
        "measure_gbr": ["own.py", "run/epoch_1.pth", "--num-samples", "4", "--out", "gbr.json"],
        "attack": ["own.py", "run/epoch_1.pth", "--num-samples", "8", "--eps", "8", "--out", "attack"],
        "fold": ["own.py", "run/epoch_1.pth", "folded.pth"],
        "report": ["run"],
        "prepare_cifar10": ["few.zip"],
    }
    lines = [" ".join([f"{tool}.py", *arguments]) for tool, arguments in commands.items()]
    printed = user.run(sys.executable, "-c", IN_TURN, user.tools, *lines)
    return dict(zip(commands, printed.split("$ ")[1:], strict=True)) | {"end": printed}


def test_the_wheel_carries_configs_tools_and_the_model_index(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "tools"):
        files = [path for path in (ROOT / folder).rglob("*.*") if "__pycache__" not in path.parts]
        missing = [p for p in files if f"enc_plugin/.mim/{p.relative_to(ROOT)}" not in names]
        assert files
        assert not missing
    assert {"enc_plugin/.mim/model-index.yml", "enc_plugin/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "lab", "data", "work_dirs"))]


def test_every_tool_of_the_wheel_has_a_run_here(user):
    tools = {path.name for path in user.tools.iterdir() if not path.name.startswith("_")}
    text = Path(__file__).read_text()
    assert {name for name in tools if name.removesuffix(".py") not in text} == set()


def test_the_installed_tools_train_test_measure_attack_fold_and_report(user, ran):
    assert f"{user.package}/__init__.py" in ran["end"]
    assert user.ran_from_the_wheel("run")
    assert user.ran_from_the_wheel("tested")
    assert "ENC: 10 layers (ws, alpha 1), 1 with an added batch norm" in ran["train"]
    assert "accuracy/top1" in ran["test"]
    assert "gbr" in (user.folder / "gbr.json").read_text()
    assert "FGSM" in ran["attack"]
    assert (user.folder / "folded.pth").is_file()
    assert (user.folder / "report.html").stat().st_size > 10_000
    assert "prepare_cifar10: " in ran["prepare_cifar10"]
    assert "expected 5000 images" in ran["prepare_cifar10"]


def test_mmpretrains_own_tool_trains_a_config_on_top_of_the_packages(user):
    printed = user.run(sys.executable, STOCK_TRAIN, "own.py", "--work-dir", "stock", *SHORT)
    assert "ENC: 10 layers (ws, alpha 1), 1 with an added batch norm" in printed
    assert user.ran_from_the_wheel("stock")
    assert any("accuracy/top1" in line for line in scalars(user.folder / "stock"))


@pytest.mark.slow
def test_the_installed_scripts_train_and_test_on_two_processes(user):
    printed = user.run("bash", user.tools / "dist_train.sh", "own.py", "2", "--work-dir", "dist", *SHORT)
    assert "the distributed backend is gloo" in printed or torch.cuda.is_available()
    user.run("bash", user.tools / "dist_test.sh", "own.py", "dist/epoch_1.pth", "2", "--work-dir", "dist_tested")
    assert user.ran_from_the_wheel("dist")
    assert user.ran_from_the_wheel("dist_tested")


@pytest.mark.slow
def test_the_installed_slurm_script_starts_the_installed_tool(user):
    """``srun`` is a script here that starts one task."""
    srun = user.folder / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    command = ["bash", user.tools / "slurm_train.sh", "gpus", "job", "own.py", "slurm", *SHORT]
    path = f"{srun.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    task = dict(SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_NODELIST="localhost", SLURM_LOCALID="0")
    code = 0 if torch.cuda.is_available() else 1
    printed = user.run(*command, code=code, PATH=path, MASTER_ADDR="127.0.0.1", GPUS="1", SRUN_ARGS="-x bad", **task)
    assert "srun -p gpus --job-name=job" in printed
    assert "--ntasks=1" in printed
    assert "-x bad python -u" in printed
    if code:
        assert "train: launcher: without CUDA only 'pytorch' works, got 'slurm'" in printed


@pytest.mark.slow
def test_the_installed_doctor_examines_the_installed_package(user):
    printed = user.run(sys.executable, user.tools / "doctor.py", "--quick", "--config", "own.py")
    assert f"{user.package}; its parts are registered" in printed
    assert "10 layers (ws)" in printed


@pytest.mark.slow
def test_the_installed_demo_trains_and_compares(user):
    assert "report: work_dirs/demo/report.html" in user.run(sys.executable, user.tools / "demo.py")
    assert (user.folder / "work_dirs" / "demo" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_installed_preparation_unpacks_cifar10(user):
    picture = cv2.imencode(".png", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
    with zipfile.ZipFile(user.folder / "whole.zip", "w") as archive:
        for split, count in (("train", 5000), ("test", 1000)):
            for name in CLASSES:
                for i in range(count):
                    archive.writestr(f"{split}/{name}/{i:04d}.png", picture)
    printed = user.run(sys.executable, user.tools / "prepare_cifar10.py", "whole.zip")
    assert "CIFAR-10 is in data/cifar10" in printed
    assert len(list((user.folder / "data" / "cifar10").glob("*/*/*.png"))) == 60_000


@pytest.mark.slow
def test_mim_trains_a_config_on_top_of_the_packages(user):
    pytest.importorskip("mim")
    printed = user.run(sys.executable, "-m", "mim", "train", "mmpretrain", "own.py", "--work-dir", "mim", *SHORT)
    assert "Training finished successfully" in printed
    assert any("accuracy/top1" in line for line in scalars(user.folder / "mim"))
