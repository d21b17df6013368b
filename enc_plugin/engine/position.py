"""Moves a resumed run to the position of its checkpoint: runs a missing validation, skips finished batches."""

from __future__ import annotations

from collections.abc import Callable

from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop


def is_validation_due(loop: BaseLoop, batch: int) -> bool:
    """Whether ``loop`` validates before it trains the next batch; ``batch`` is the number of batches of this epoch."""
    if isinstance(loop, IterBasedTrainLoop):
        done, last = loop.iter, loop.max_iters
    elif isinstance(loop, EpochBasedTrainLoop) and batch == 0:
        done, last = loop.epoch, loop.max_epochs
    else:
        return False
    if loop.runner.val_loop is None:
        return False
    loop._decide_current_val_interval()
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)


def skip(loop: EpochBasedTrainLoop, batches: int, then: Callable[[], None]) -> None:
    """Let an epoch-based loop load and drop its next ``batches`` batches; call ``then`` before it loads the next."""
    run_iter = loop.run_iter

    def drop(idx: int, data_batch) -> None:
        if idx + 1 == batches:
            loop.run_iter = run_iter
            then()

    loop.run_iter = drop


class SkippedFirst:
    """Batches of an ``IterBasedTrainLoop``, which drops the first ``batches`` itself; calls ``then`` after that."""

    def __init__(self, loop: IterBasedTrainLoop, batches: int, then: Callable[[], None]):
        self._loop = loop
        self._batches = loop.dataloader_iterator
        self._left = batches
        self._then = then

    def skip_iter(self, batches: int) -> None:
        """Called by onedl-mmengine to drop batches: load them, so that workers and transforms draw the same numbers."""
        for _ in range(batches):
            next(self)

    def __next__(self):
        if self._left == 0:
            self._loop.dataloader_iterator = self._batches
            self._then()
        self._left -= 1
        return next(self._batches)
