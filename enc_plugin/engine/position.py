"""Where in a run a checkpoint was written: whether a validation is still due, and which batches are done."""

from __future__ import annotations

from collections.abc import Callable

from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop


def is_validation_due(loop: BaseLoop, batch: int) -> bool:
    """Whether ``loop`` validates at this point before it trains on."""
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
    """Let ``loop`` drop its next ``batches`` batches, and call ``then`` before it loads the one behind them."""
    run_iter = loop.run_iter

    def drop(idx: int, data_batch) -> None:
        if idx + 1 == batches:
            loop.run_iter = run_iter
            then()

    loop.run_iter = drop


class SkippedFirst:
    """Batches of a resumed ``IterBasedTrainLoop``, which drops the first ones itself: ``then`` is called after that."""

    def __init__(self, loop: IterBasedTrainLoop, batches: int, then: Callable[[], None]):
        self._loop = loop
        self._batches = loop.dataloader_iterator
        self._left = batches
        self._then = then

    def skip_iter(self, batches: int) -> None:
        """What onedl-mmengine drops them by: loading, so that workers and transforms draw what they had drawn."""
        for _ in range(batches):
            next(self)

    def __next__(self):
        if self._left == 0:
            self._loop.dataloader_iterator = self._batches
            self._then()
        self._left -= 1
        return next(self._batches)
