"""Checks of the Python interpreter, its packages and the machine."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..installation import ROOT, STACK, is_installed, usable_cores
from .finding import BROKEN, NOTE, OK, Finding, Result, examine, quietly
from .packages import check_extras, check_packages

_GLOO = """
import multiprocessing, sys, torch, torch.distributed as dist
def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    total = torch.ones(1) * (rank + 1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    sys.exit(0 if total.item() == 3 else 1)
torch.set_num_threads(1)
processes = [multiprocessing.get_context("fork").Process(target=work, args=(r, sys.argv[1])) for r in range(2)]
[p.start() for p in processes]
[p.join() for p in processes]
sys.exit(max(p.exitcode for p in processes))
"""
_COMPILE = """
import torch
x = torch.randn(64)
assert torch.allclose(torch.compile(lambda x: torch.relu(x) * 2 + 1)(x), torch.relu(x) * 2 + 1)
"""


def check_environment(quick: bool = False, seconds: float = 120) -> Iterator[Finding]:
    """Check this interpreter, its packages and this machine; arguments as for :func:`enc_plugin.doctor.run`."""
    old = sys.version_info < (3, 10)
    yield Finding("python", BROKEN if old else OK, platform.python_version(), "use Python 3.10 or later" if old else "")
    torch_alone = not any(map(is_installed, STACK))
    packages = list(check_packages(torch_alone))
    yield from packages
    if any(finding.state == BROKEN for finding in packages):
        return  # the other checks would fail for the same reasons
    yield from examine("enc_plugin", _plugin)
    yield from examine("importable", _importable_elsewhere, seconds)
    if not torch_alone:
        yield from examine("checkpoints", _checkpoints)
    yield from examine("cuda", _cuda)
    if not quick:
        yield from examine("gloo", _gloo, seconds)
        yield from examine("torch.compile", _compile, seconds)
    yield from examine("threads", _threads)
    yield from check_extras()


def _plugin() -> Iterator[Result]:
    try:
        plugin = quietly(importlib.import_module, "enc_plugin")
    except ImportError as error:
        yield BROKEN, f"importing it fails: {error}", "follow the advice in the message"
        return
    where = f"{plugin.__version__}, {Path(plugin.__file__).parent}"
    if not is_installed("mmengine"):
        yield OK, where
        return
    from mmengine.registry import HOOKS, MODELS

    missing = [x for x, r in (("ENCImageClassifier", MODELS), ("ENCAuditHook", HOOKS)) if r.get(x) is None]
    if missing:
        yield BROKEN, f"{', '.join(missing)} not in the registry", "run pip install -e . again"
    else:
        yield OK, f"{where}; its parts are registered"


def _importable_elsewhere(seconds: float) -> Iterator[Result]:
    """Whether a process in another folder finds this plugin, as ``custom_imports`` of mim and other tools must."""
    here = Path(__file__).resolve().parents[1]
    code = "import importlib.util; s = importlib.util.find_spec('enc_plugin'); print(s and s.origin or '')"
    with tempfile.TemporaryDirectory() as folder:
        out = _process(["-c", code], seconds, cwd=folder).stdout.strip()
    if not out:
        found = "other tools (those of mim and mmpretrain) do not find the plugin; the tools in this folder do"
        yield NOTE, found, f"pip install -e {ROOT}"
    elif Path(out).resolve().parent != here:
        found = f"other tools find another copy: {Path(out).parent}"
        yield NOTE, found, f"pip install -e {ROOT}, or run the tools of that copy"
    else:
        yield OK, "found from any folder"


def _checkpoints() -> Iterator[Result]:
    import torch
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import load_checkpoint, save_checkpoint

    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "checkpoint.pth"))
        history = {"train/loss": HistoryBuffer([1.0, 2.0], [1, 1])}
        save_checkpoint({"state_dict": layer.state_dict(), "message_hub": {"log_scalars": history}}, path)
        quietly(load_checkpoint, other, path)
    if torch.equal(layer.weight, other.weight):
        yield OK, "a checkpoint of mmengine was saved and loaded under weights_only"
    else:
        yield BROKEN, "a checkpoint was loaded with other values than those saved", "reinstall torch"


def _cuda() -> Iterator[Result]:
    import torch

    if not torch.cuda.is_available():
        kind = "this torch is built without CUDA" if torch.version.cuda is None else "no usable CUDA device"
        yield OK, f"{kind}: training runs on the CPU, distributed training with gloo (nccl needs CUDA)"
        return
    value = torch.ones(8, device="cuda").sum().item()
    nccl = "nccl" if torch.distributed.is_nccl_available() else "no nccl"
    state = OK if value == 8 else BROKEN
    yield state, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {nccl}"


def _gloo(seconds: float) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        done = _process(["-c", _GLOO, folder], seconds)
    advice = "set GLOO_SOCKET_IFNAME=lo if the host name does not resolve; training on one process works without gloo"
    yield from _trial(done, "two processes summed a tensor", "distributed training on the CPU fails", advice)


def _compile(seconds: float) -> Iterator[Result]:
    done = _process(["-c", _COMPILE], seconds)
    advice = "install a C++ compiler (apt-get install g++), or do not set `compile` in the config"
    yield from _trial(done, "compiled a function", "does not work", advice)


def _threads() -> Iterator[Result]:
    import torch

    cores = usable_cores()
    wanted = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    values = ", ".join(f"{k}={os.environ.get(k, 'unset')}" for k in (*wanted, "OMP_NUM_THREADS"))
    found = f"{torch.get_num_threads()} threads on {cores} cores; {values}"
    spinning = [k for k, v in wanted.items() if os.environ.get(k, "").lower() != v]
    if torch.get_num_threads() > cores or spinning:
        advice = "export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 OMP_NUM_THREADS=<cores / processes>"
        yield NOTE, f"{found}: idle threads slow other processes down", advice
    else:
        yield OK, found


def _process(arguments: list[str], seconds: float, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, **kwargs)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"not done within {seconds:.0f} s")


def _trial(done: subprocess.CompletedProcess, works: str, fails: str, advice: str) -> Iterator[Result]:
    if done.returncode == 0:
        yield OK, works
        return
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    yield NOTE, f"{fails}: {(errors or lines or [f'exit code {done.returncode}'])[-1][:200]}", advice
