"""Shortens the log on the terminal; the log file stays complete, and ``ENC_VERBOSE=1`` prints everything."""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import MMLogger
from mmengine.runner import Runner

from ..installation import is_verbose
from ..version import __version__

# mmengine's log of system, config and hooks (some 270 lines before the first iteration), warnings about its code, and
# the progress at the last batch of a validation, whose next line has the result.
_FOR_THE_RECORD = re.compile(
    r"\n-+\nSystem environment:|Config:\n|Hooks will be executed in the following order:|Exp name: "
    r"|paramwise_options -- |Code: |Distributed training is not used, all SyncBatchNorm"
    r'|"FileClient" will be deprecated|"HardDiskBackend" is the alias'
    r"|(Epoch|Iter)\((val|test)\) *(\[\d+\])? *\[(?P<last>\d+)/(?P=last)\] +eta: "
)


def terminal_handlers(logger: logging.Logger) -> list[logging.StreamHandler]:
    """Handlers of ``logger`` that write to a stream other than a file."""
    return [
        handler
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]


def shorten_terminal_log() -> None:
    """Shorten the terminal log of every Runner that this process builds from now on.

    Nothing changes for runs without a log file, or if ``ENC_VERBOSE`` is set.
    """
    build_logger = Runner.build_logger
    if is_verbose() or getattr(build_logger, "is_short", False):
        return

    def build_short_logger(self: Runner, *args, **kwargs) -> MMLogger:
        logger = build_logger(self, *args, **kwargs)
        if logger.log_file is not None:
            for handler in terminal_handlers(logger):
                handler.addFilter(_is_for_the_user)
            logger.info(f"System, config and hooks: see {logger.log_file} (ENC_VERBOSE=1 prints them)")
            logger.info(f"Code: enc_plugin {__version__}, {_commit()}")
        return logger

    build_short_logger.is_short = True
    Runner.build_logger = build_short_logger


def _commit() -> str:
    """Commit of the git repository in the working directory."""
    git = ["git", "describe", "--always", "--dirty= (changed)", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "git is not available"
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "not in a git repository"


@contextmanager
def keep_traceback() -> Iterator[None]:
    """Context that writes the traceback of an error to the log file of the run, if there is one."""
    try:
        yield
    except Exception as error:
        logger = MMLogger.get_current_instance()
        traceback = (type(error), error, error.__traceback__)
        record = logger.makeRecord(logger.name, logging.ERROR, "", 0, "The run has failed:", (), traceback)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)
        raise


def _is_for_the_user(record: logging.LogRecord) -> bool:
    return _FOR_THE_RECORD.match(record.getMessage()) is None
