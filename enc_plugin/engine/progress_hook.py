"""Hook that shows the progress of training on a terminal."""

from __future__ import annotations

import atexit
import logging
import sys

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..installation import is_verbose
from .quiet import terminal_handlers


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows one line with epoch, loss, iterations and remaining time, if stdout is a terminal.

    Log lines of iterations then go only to the log file, and all others appear above the progress line. The hook does
    nothing if stdout is not a terminal, in all processes except the first, and with ``ENC_VERBOSE=1``.
    """

    priority = "LOWEST"  # after LoggerHook, so that log lines and the display do not mix

    def __init__(self):
        self._display: Progress | None = None

    def before_train(self, runner: Runner) -> None:
        """Start the display."""
        if not (is_main_process() and sys.stdout.isatty()) or is_verbose():
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._display = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._display.start()
        # Restore the terminal also if the run ends with an error.
        atexit.register(self._stop, runner.logger)
        for handler in terminal_handlers(runner.logger):
            handler.setStream(sys.stdout)  # rich has replaced it by a stream that prints above the display
            handler.addFilter(_is_no_iteration)
        self._task = self._display.add_task("", total=runner.max_iters, completed=runner.iter)
        self._by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        """Advance the display."""
        if self._display is not None:
            loss = runner.message_hub.log_scalars.get("train/loss")  # on the host, so reading it does not wait
            text = f"epoch {runner.epoch + 1}/{runner.max_epochs}" if self._by_epoch else "iteration"
            text += f"  loss {loss.current():.4g}" if loss is not None else ""
            self._display.update(self._task, completed=runner.iter + 1, description=text)

    def after_train(self, runner: Runner) -> None:
        """End the display."""
        self._stop(runner.logger)

    def _stop(self, logger: logging.Logger) -> None:
        if self._display is None:
            return
        atexit.unregister(self._stop)
        self._display.stop()
        self._display = None
        for handler in terminal_handlers(logger):
            handler.setStream(sys.stdout)
            handler.removeFilter(_is_no_iteration)


def _is_no_iteration(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("Epoch(train)", "Iter(train)"))
