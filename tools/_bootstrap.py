"""Process settings that have to stand before torch is imported; every tool imports this first."""

import logging
import os
import sys
import warnings
from pathlib import Path

# Run from a checkout as well as from an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Idle OpenMP threads that spin starve every other process (data workers, other ranks): 3.4 s a step against 0.07 s were
# seen on two busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores // _processes)))
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

# mmengine's MLflow backend writes to a folder, which MLflow 3 refuses unless it is told that this is meant.
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")

# Warnings that a user can do nothing about: no CUDA on a machine without one, operators that classification never
# calls, an argument that mmengine passes to torch.
if os.environ.get("ENC_VERBOSE", "0") in ("", "0"):
    warnings.filterwarnings("ignore", "Fail to import ``MultiScaleDeformableAttention``", UserWarning)
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator", UserWarning)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.msg)
