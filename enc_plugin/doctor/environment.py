"""Whether this interpreter, its packages and this machine work."""

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

from ..installation import ROOT, STACK, is_installed
from .finding import BROKEN, NOTE, OK, Finding, examine, quietly
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
    """Findings on this interpreter, its packages and this machine.

    Args:
        quick: Leave out what starts processes (gloo, ``torch.compile``).
        seconds: Time limit of each process.
    """
    old = sys.version_info < (3, 10)
    yield Finding("python", BROKEN if old else OK, platform.python_version(), "use Python 3.10 or later" if old else "")
    torch_alone = not any(map(is_installed, STACK))
    packages = list(check_packages(torch_alone))
    yield from packages
    if any(finding.state == BROKEN for finding in packages):
        return  # what follows fails for the same reasons
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


def _plugin() -> Iterator[Finding]:
    try:
        plugin = quietly(importlib.import_module, "enc_plugin")
    except ImportError as error:
        yield Finding("enc_plugin", BROKEN, f"importing it fails: {error}", "do what the message says")
        return
    where = f"{plugin.__version__}, {Path(plugin.__file__).parent}"
    if not is_installed("mmengine"):
        yield Finding("enc_plugin", OK, where)
        return
    from mmengine.registry import HOOKS, MODELS

    missing = [x for x, r in (("ENCImageClassifier", MODELS), ("ENCAuditHook", HOOKS)) if r.get(x) is None]
    if missing:
        yield Finding("enc_plugin", BROKEN, f"{', '.join(missing)} not in the registry", "pip install -e . again")
        return
    yield Finding("enc_plugin", OK, f"{where}; its parts are registered")


def _importable_elsewhere(seconds: float) -> Iterator[Finding]:
    """A process that starts in another folder, as mim and other tools' ``custom_imports`` do, finds this plugin."""
    here = Path(__file__).resolve().parents[1]
    code = "import importlib.util; s = importlib.util.find_spec('enc_plugin'); print(s and s.origin or '')"
    with tempfile.TemporaryDirectory() as folder:
        out = _process(["-c", code], seconds, cwd=folder).stdout.strip()
    if not out:
        found = "other tools (mim, mmpretrain's own) do not find the plugin; the tools of this folder do"
        yield Finding("importable", NOTE, found, f"pip install -e {ROOT}")
    elif Path(out).resolve().parent != here:
        found = f"other tools find another copy: {Path(out).parent}"
        yield Finding("importable", NOTE, found, f"pip install -e {ROOT}, or run the tools of that copy")
    else:
        yield Finding("importable", OK, "found from any folder")


def _checkpoints() -> Iterator[Finding]:
    import torch
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import load_checkpoint, save_checkpoint

    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "checkpoint.pth"))
        history = {"train/loss": HistoryBuffer([1.0, 2.0], [1, 1])}
        save_checkpoint({"state_dict": layer.state_dict(), "message_hub": {"log_scalars": history}}, path)
        quietly(load_checkpoint, other, path)
    if not torch.equal(layer.weight, other.weight):
        yield Finding("checkpoints", BROKEN, "a checkpoint did not come back as it was written", "reinstall torch")
        return
    yield Finding("checkpoints", OK, "one of mmengine's was written and loaded under weights_only")


def _cuda() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        kind = "this torch is built without CUDA" if torch.version.cuda is None else "no usable CUDA device"
        yield Finding("cuda", OK, f"{kind}: the CPU is used, distributed by gloo (nccl needs CUDA)")
        return
    value = torch.ones(8, device="cuda").sum().item()
    nccl = "nccl" if torch.distributed.is_nccl_available() else "no nccl"
    state = OK if value == 8 else BROKEN
    yield Finding("cuda", state, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {nccl}")


def _gloo(seconds: float) -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        done = _process(["-c", _GLOO, folder], seconds)
    if done.returncode == 0:
        yield Finding("gloo", OK, "two processes summed a tensor")
        return
    advice = "set GLOO_SOCKET_IFNAME=lo if the host name does not resolve; one process works without it"
    yield Finding("gloo", NOTE, f"distributed training on the CPU fails: {_last_line(done)}", advice)


def _compile(seconds: float) -> Iterator[Finding]:
    done = _process(["-c", _COMPILE], seconds)
    if done.returncode == 0:
        yield Finding("torch.compile", OK, "compiled a function")
        return
    advice = "install a C++ compiler (apt-get install g++), or leave `compile` out of the config"
    yield Finding("torch.compile", NOTE, f"does not work: {_last_line(done)}", advice)


def _threads() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    values = ", ".join(f"{k}={os.environ.get(k, 'unset')}" for k in (*wanted, "OMP_NUM_THREADS"))
    found = f"{torch.get_num_threads()} threads on {cores} cores; {values}"
    spinning = [k for k, v in wanted.items() if os.environ.get(k, "").lower() != v]
    if torch.get_num_threads() > cores or spinning:
        advice = "export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 OMP_NUM_THREADS=<cores / processes>"
        yield Finding("threads", NOTE, f"{found}: idle threads slow other processes down", advice)
        return
    yield Finding("threads", OK, found)


def _process(arguments: list[str], seconds: float, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, **kwargs)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"not done within {seconds:.0f} s")


def _last_line(done: subprocess.CompletedProcess) -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [f"exit code {done.returncode}"])[-1][:200]
