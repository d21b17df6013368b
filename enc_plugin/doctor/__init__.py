"""The doctor: whether the environment works, and whether a config would, before hours of training.

Nothing outside the standard library is imported before it is examined: the doctor runs where the rest does not.
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
    """Examine the environment, and with ``config`` that config; print one line a finding.

    Args:
        config: Config to examine: it is built, its data looked for, and one batch sent through the network.
        options: Changes to the config, as for ``--cfg-options``.
        quick: Leave out what starts processes (gloo, ``torch.compile``).
        seconds: Time limit of each process.
        device: Where the batch is computed, such as ``'cpu'`` or ``'cuda:1'``; None: a GPU if there is one.

    Returns:
        Exit code: 1 if anything is broken, else 0.
    """
    logging.disable(logging.CRITICAL)  # the libraries' loggers: what is wrong is in the findings
    findings = list(check_environment(quick, seconds))
    if config is not None:
        if any(finding.state == BROKEN for finding in findings) or not is_installed("mmengine"):
            findings.append(Finding("config", BROKEN, "not examined", "mend the environment first"))
        else:
            from .config import check_config

            findings += check_config(config, options, device)
    logging.disable(logging.NOTSET)
    _show(findings)
    return int(any(finding.state == BROKEN for finding in findings))


def _show(findings: Sequence[Finding]) -> None:
    """Print the findings: coloured where rich and a terminal are there, plain lines elsewhere."""
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
    print(f"{broken} broken" if broken else "everything needed works")
