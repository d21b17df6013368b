"""The doctor: checks of the environment and of a config before hours of training.

Third-party packages are imported only after they have been checked, so the doctor also runs in a broken environment.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..installation import is_installed
from .environment import check_environment
from .finding import BROKEN, NOTE, OK, Finding

__all__ = ["BROKEN", "NOTE", "OK", "Finding", "check_environment", "run"]


def run(
    config: str | None = None,
    options: dict | None = None,
    quick: bool = False,
    seconds: float = 120,
    device: str | None = None,
) -> int:
    """Check the environment, and ``config`` if it is given; print one line for each finding.

    Args:
        config: Config to check: its network and its data are built, and one batch runs through the network.
        options: Changes to the config, as for ``--cfg-options``.
        quick: Skip the checks that start processes (gloo, ``torch.compile``).
        seconds: Time limit of each process.
        device: Device of the batch, such as ``'cpu'`` or ``'cuda:1'``; None: a GPU if there is one.

    Returns:
        Exit code: 1 if anything is broken, else 0.
    """
    logging.disable(logging.CRITICAL)  # the findings report what libraries would log
    findings = list(check_environment(quick, seconds))
    if config is not None:
        if any(finding.state == BROKEN for finding in findings) or not is_installed("mmengine"):
            findings.append(Finding("config", BROKEN, "not checked", "fix the environment first"))
        else:
            from .config import check_config

            findings += check_config(config, options, device)
    logging.disable(logging.NOTSET)
    _show(findings)
    return int(any(finding.state == BROKEN for finding in findings))


def _show(findings: Sequence[Finding]) -> None:
    """Print the findings, in colour if rich is installed and the output is a terminal."""
    marks = {OK: ("ok    ", "green"), NOTE: ("note  ", "yellow"), BROKEN: ("BROKEN", "bold red")}
    try:
        from rich.console import Console

        console = Console(soft_wrap=True, highlight=False)
    except ImportError:
        console = None
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark, style = marks[finding.state]
        if console is None:
            print(f"{mark}  {finding.name.ljust(width)}  {finding.found}")
        else:
            console.print(f"[{style}]{mark}[/]  [bold]{finding.name.ljust(width)}[/]  ", end="")
            console.print(finding.found, markup=False)
        if finding.advice:
            print(f"{'':{width + 8}}  -> {finding.advice}")
    broken = sum(finding.state == BROKEN for finding in findings)
    print(f"{broken} broken" if broken else "everything that is needed works")
