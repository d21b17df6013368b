"""What several tests need: real short runs on the digits, alone and on several processes."""

from __future__ import annotations

import functools
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import mmengine.config
import pytest
import scipy
import timm
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
TORCH, SCIPY = (tuple(int(part) for part in package.__version__.split(".")[:2]) for package in (torch, scipy))
# Older ones lack some optimizers, and options of others; the decay of one is of another kind.
NEW_TIMM = tuple(int(part) for part in timm.__version__.split(".")[:3]) >= (1, 0, 20)


def quicken() -> None:
    """Make short runs in this process quick: a third of the time, with nothing left out that a test is about.

    mmengine formats the config by yapf for each log, dump and checkpoint (``format_python_code=False`` of
    ``Config.fromfile`` is lost on the way), parses mmpretrain's 85 metafiles for every ``mmpretrain::`` base, and
    collects garbage for each data set: what has been imported is none.
    """
    mmengine.config.config.FormatCode = lambda text, **_: (text, True)
    mmengine.config.utils._get_cfg_metainfo = functools.cache(mmengine.config.utils._get_cfg_metainfo)
    gc.freeze()


def digits_config(work_dir: Path, name: str = "resnet8_enc-ws_1xb64", epochs: int = 1, **options) -> Config:
    """``configs/digits/<name>.py`` with 192 training and 64 test images: three iterations an epoch.

    ``options`` are dotted keys as for ``--cfg-options``, with ``__`` for the dots.
    """
    cfg = Config.fromfile(CONFIGS / "digits" / f"{name}.py")
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


def on_processes(count: int, work: Callable, *args, timeout: float = 600) -> None:
    """Call ``work(*args)`` in ``count`` processes that find each other as torchrun's do; all have to end well.

    A server imports the package once, for the tests of all modules, and forks: what starts is at once ready. (A fork of
    the process of the tests could not run autograd.)
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["enc_plugin", "mmpretrain.datasets", "mmpretrain.models"])
    port = free_port()
    ranks = [context.Process(target=_rank, args=(rank, count, port, work, args)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
    assert [process.exitcode for process in ranks] == [0] * count


def _rank(rank: int, count: int, port: int, work: Callable, args: tuple) -> None:
    quicken()
    torch.set_num_threads(1)
    os.environ |= dict(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{count}", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    work(*args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # none leaves while another still sends
        torch.distributed.destroy_process_group()


def train_on_processes(cfg: Config, count: int, timeout: float = 600) -> None:
    """Train a config on gloo processes, without the tool that users start."""
    path = Path(cfg.work_dir).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(path)
    on_processes(count, _train_file, path, timeout=timeout)


def _train_file(path: Path) -> None:
    cfg = Config.fromfile(path)
    cfg.launcher = "pytorch"
    train(cfg)


def run_tool(name: str, arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    """``python tools/<name>.py`` in this process: starting another costs ten times as much."""
    patch.syspath_prepend(str(ROOT / "tools"))
    patch.setattr(os, "environ", os.environ.copy())
    patch.setattr(Runner, "build_logger", Runner.build_logger)  # put back what the tool shortens
    patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")


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
