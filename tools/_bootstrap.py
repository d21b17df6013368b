"""Imported first by every tool: process settings that must precede the import of torch, options, and error lines."""

import argparse
import contextlib
import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path

# Tools run from a checkout and from an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# By default, idle OpenMP threads spin and slow down all other processes (data workers, other ranks): on two busy cores,
# a step took 3.4 s instead of 0.07 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores // _processes)))
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

# mmengine's MLflow backend writes to a folder, which MLflow 3 refuses without this variable.
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


def _is_verbose() -> bool:
    return os.environ.get("ENC_VERBOSE", "0") not in ("", "0")


# Hide warnings that a user can do nothing about: about missing CUDA, operators that classification does not use, and an
# argument that mmengine passes to torch; and one that torch repeats at every data loader and epoch.
if not _is_verbose():
    warnings.filterwarnings("ignore", "Fail to import ``MultiScaleDeformableAttention``", UserWarning)
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator", UserWarning)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes", UserWarning)  # the log says it
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.msg)

_WAIT = 15  # seconds; longer than a process takes to end


@contextlib.contextmanager
def one_line(tool: str, go_on: str = "run it again"):
    """Context whose errors end the tool with one line on stderr and exit code 1; ENC_VERBOSE=1 shows the traceback.

    With several processes, rank 0 prints its error at once and the others wait before they print theirs. torchrun stops
    them while they wait, so they print only if rank 0 has not failed.

    Args:
        tool: Name of the tool, with which the line begins.
        go_on: Advice to print after Ctrl-C, which ends the tool with exit code 130.
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
        if _is_verbose():
            raise
        if rank:
            time.sleep(_WAIT)
        sys.exit(f"{tool}: {f'rank {rank}: ' if rank else ''}{_text(error)}")


def _refuse_parts_in_options() -> None:
    """Raise for ``dict(...)`` in --cfg-options, which mmengine reads as text or recurses on forever."""
    part = next((argument for argument in sys.argv if re.match(r"[\w.]+=.*dict\(", argument)), None)
    if part is not None and "--cfg-options" in sys.argv:
        raise ValueError(
            f"--cfg-options: {part!r} cannot be read, because mmengine does not parse dict(...); to add hooks, write a "
            'config of two lines: _base_ = ["CONFIG"] and custom_hooks = [dict(type="GBRHook"), dict(type="FGSMHook")]'
        )


def _text(error: Exception) -> str:
    from enc_plugin.refused import describe

    text = describe(error, 2000)
    # These types have messages written for users; for all others, the type helps.
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return text.removeprefix(f"{type(error).__name__}: ")
    return text


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options --cfg-options and --device."""
    from mmengine.config import DictAction

    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes to the config, as in training")
    parser.add_argument("--device", help="device, such as cpu or cuda:1 (default: a GPU if there is one)")


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Add the arguments CONFIG CHECKPOINT ... ."""
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CONFIG CHECKPOINT",
        help="config (a file, or package::name) followed by its checkpoints; several such groups may be given",
    )


def read_checkpoints(arguments: list[str], options: dict | None) -> list[tuple]:
    """Read CONFIG CHECKPOINT ... into pairs of a config and a checkpoint path.

    Raises:
        ValueError: If a config has no checkpoint.
    """
    from enc_plugin.build import load_config

    def is_config(argument: str) -> bool:
        return argument.endswith(".py") or "::" in argument

    pairs, config = [], None
    for place, argument in enumerate(arguments):
        if config is not None and not is_config(argument):
            pairs.append((config, argument))
            continue
        if place + 1 == len(arguments) or is_config(arguments[place + 1]):
            raise ValueError(f"checkpoints: expected CONFIG CHECKPOINT ..., got no checkpoint for {argument}")
        config = load_config(argument, options)
    return pairs
