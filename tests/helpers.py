"""What several tests need: real short runs on the digits, alone and on several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def digits_config(work_dir: Path, name: str = "resnet8_enc-ws_1xb64", epochs: int = 1, **options) -> Config:
    """``configs/digits/<name>.py`` with 192 training and 64 test images: three iterations an epoch.

    ``options`` are dotted keys as for ``--cfg-options``, with ``__`` for the dots.
    """
    cfg = Config.fromfile(CONFIGS / "digits" / f"{name}.py", format_python_code=False)
    cfg.work_dir = str(work_dir)
    cfg.launcher = "none"
    cfg.train_cfg.max_epochs = epochs
    cfg.train_dataloader.dataset.indices = 192
    cfg.val_dataloader.dataset.indices = 64
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in options.items()})
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Runner of the config, under a name of its own (mmengine keeps its runners by name)."""
    cfg.experiment_name = f"{Path(cfg.work_dir).name}_{os.urandom(4).hex()}"
    return RUNNERS.build(cfg)


def train(cfg: Config) -> Runner:
    """Build the runner, train, and return it."""
    runner = build_runner(cfg)
    runner.train()
    return runner


def scalars(work_dir: Path) -> list[dict]:
    """All lines of the run's ``scalars.json``, in the order they were logged."""
    path = next(Path(work_dir).glob("*/vis_data/scalars.json"))
    return [json.loads(line) for line in path.read_text().splitlines()]


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_command(command: list[str], timeout: float = 240, **env: str) -> subprocess.CompletedProcess:
    """Run a command from the repository's root with one thread a process, output captured as text."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **env}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def dist_train(
    config: str | Path, processes: int, *arguments: str, timeout: float = 240
) -> subprocess.CompletedProcess:
    """``tools/dist_train.sh`` on gloo processes; a failure carries the output."""
    command = ["bash", "tools/dist_train.sh", str(config), str(processes), *arguments]
    done = run_command(command, timeout, PORT=str(free_port()))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done
