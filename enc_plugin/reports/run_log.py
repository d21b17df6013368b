"""Origin of a run, read from the head of its log file: config, date, seed, commit, machine, versions."""

from __future__ import annotations

import contextlib
import datetime
import re
from pathlib import Path

_HEAD = 60_000  # characters: mmengine logs environment and config before the first iteration
_GPU = re.compile(r"^ +GPU [\d,]+: (.+)$", re.M)
_PATTERNS = {
    "seed": re.compile(r"^ +seed: (\d+)$", re.M),
    "commit": re.compile(r" - Code: .*commit (\S+(?: \(changed\))?)"),
    "processes": re.compile(r"^ +GPU number: (\d+)$", re.M),  # mmengine logs the number of processes under this name
    "torch": re.compile(r"^ +PyTorch: (\S+)$", re.M),
    "mmengine": re.compile(r"^ +MMEngine: (\S+)$", re.M),
    "enc_plugin": re.compile(r" - Code: enc_plugin ([^\s,]+)"),
}


def read_origin(work_dir: Path, start: Path) -> dict[str, str]:
    """What the log says about the origin of a run, by table heading.

    Args:
        work_dir: Folder of the run, into which mmengine copies the config.
        start: Subfolder of one start of the run, named by its time, with the log.
    """
    found = {}
    configs = [path.name for path in work_dir.glob("*.py")]
    if len(configs) == 1:
        found["config"] = configs[0]
    with contextlib.suppress(ValueError):  # the folder has another name
        found["started"] = f"{datetime.datetime.strptime(start.name, '%Y%m%d_%H%M%S'):%Y-%m-%d %H:%M}"
    log = start / f"{start.name}.log"
    if not log.is_file():
        return found
    with open(log, errors="replace") as file:
        head = file.read(_HEAD)
    gpu, simd = _GPU.search(head), re.search(r"CPU capability usage: (\S+)", head)
    if gpu or simd:
        found["machine"] = gpu[1] if gpu else f"CPU ({simd[1]})"
    return found | {key: match[1] for key, pattern in _PATTERNS.items() if (match := pattern.search(head))}
