"""The demo trains a plain and an ENC network on handwritten digits and writes a report that compares them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from .installation import ROOT
from .reports.compare import write_report

RUNS = {"plain": "configs/demo/resnet8_plain.py", "ENC (ws)": "configs/demo/resnet8_enc-ws.py"}


def run_demo(out: str | Path = "work_dirs/demo") -> Path:
    """Train both networks with ``tools/train.py``, write ``report.html`` and print its table.

    Args:
        out: Folder for the two work dirs and the report.

    Returns:
        Path of the report.

    Raises:
        RuntimeError: If a training run fails; contains the end of its log.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    work_dirs = []
    for name, config in RUNS.items():
        work_dir = out / Path(config).stem
        log = out / f"{Path(config).stem}.log"
        print(f"training {name}: python tools/train.py {config} (log: {log})", flush=True)
        start = time.perf_counter()
        command = [sys.executable, ROOT / "tools" / "train.py", ROOT / config, "--work-dir", work_dir]
        with log.open("w") as stream:
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            raise RuntimeError(f"training {name} failed; the end of {log}:\n{log.read_text()[-3000:]}")
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
        work_dirs.append(work_dir)
    report = out / "report.html"
    print(write_report(work_dirs, report, list(RUNS), "ENC on the handwritten digits"))
    print(
        "This is a single run: another seed or number of threads changes accuracy and GBR, and can reverse their\n"
        "order. Means over seeds: lab/results/study/README.md of the repository."
    )
    print(f"report: {report}")
    return report
