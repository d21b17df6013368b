"""What every tool imports first: process settings from before torch is imported, options, and how a tool ends."""

import argparse
import contextlib
import logging
import os
import re
import sys
import time
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
    # One of each data loader says enough.
    warnings.filterwarnings("once", "This DataLoader will create .* worker processes", UserWarning)
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.msg)

_PATIENCE = 15  # seconds; more than a process takes to end


@contextlib.contextmanager
def one_line(tool: str, go_on: str = "run it again"):
    """Block whose errors end the tool with one line on stderr and exit code 1; ENC_VERBOSE=1 shows the traceback.

    Of several processes, the first speaks. torchrun stops the others as soon as it has ended, so that another one
    speaks only if it fails alone.

    Args:
        tool: What the line begins with.
        go_on: What the line says after Ctrl-C, which ends the tool with exit code 130.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    try:
        _refuse_parts_in_options()
        yield
    except KeyboardInterrupt:
        if not rank:
            print(f"\n{tool}: stopped; {go_on}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("ENC_VERBOSE", "0") not in ("", "0"):
            raise
        if rank:
            time.sleep(_PATIENCE)
        sys.exit(f"{tool}: {f'rank {rank}: ' if rank else ''}{_text(error)}")


def _refuse_parts_in_options() -> None:
    """mmengine takes ``dict(...)`` in --cfg-options for text, or recurses on it without end."""
    part = next((argument for argument in sys.argv if re.match(r"[\w.]+=.*dict\(", argument)), None)
    if part is not None and "--cfg-options" in sys.argv:
        raise ValueError(
            f"--cfg-options: {part!r} cannot be read, since mmengine parses no dict(...) there; hooks need a config of "
            'two lines: _base_ = ["CONFIG"] and custom_hooks = [dict(type="GBRHook"), dict(type="FGSMHook")]'
        )


def _text(error: Exception) -> str:
    from enc_plugin.refused import describe

    text = describe(error, 2000)
    # Errors that are written for users name the argument; of others, the type says more.
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return text.removeprefix(f"{type(error).__name__}: ")
    return text


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add --cfg-options and --device, which mean the same in every tool."""
    from mmengine.config import DictAction

    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes to the config, as in training")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Add the arguments CONFIG CHECKPOINT ..., which mean the same in every tool that measures."""
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CONFIG CHECKPOINT",
        help="config (a file, or package::name) and its checkpoints; more configs with theirs may follow",
    )


def read_checkpoints(arguments: list[str], options: dict | None) -> list[tuple]:
    """Pairs of a config, read once, and a checkpoint.

    Raises:
        ValueError: If a config has no checkpoint.
    """
    from enc_plugin.build import load_config

    pairs, config = [], None
    for place, argument in enumerate(arguments):
        if config is not None and not argument.endswith(".py") and "::" not in argument:
            pairs.append((config, argument))
            continue
        if place + 1 == len(arguments) or arguments[place + 1].endswith(".py"):
            raise ValueError(f"checkpoints: expected CONFIG CHECKPOINT ..., got no checkpoint for {argument}")
        config = load_config(argument, options)
    return pairs
