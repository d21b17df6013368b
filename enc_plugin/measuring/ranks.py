"""Work that the processes of a distributed run share out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmengine.dist import all_gather_object, get_dist_info

from ..refused import describe

T = TypeVar("T")


def on_all_ranks(check: Callable[[], T]) -> T:
    """Run ``check`` on every rank; where it fails on one, all raise, so that none waits for the others for ever.

    Raises:
        ValueError: With the message of a rank on which the check failed.
    """
    result, error = None, None
    try:
        result = check()
    except Exception as caught:
        error = caught
    is_clear = isinstance(error, (ValueError, TypeError))
    messages = all_gather_object(None if error is None else str(error) if is_clear else describe(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"{message} (found by process {rank})")
    return result


def joined(own: list[T]) -> list[T]:
    """The lists of all ranks as one, in the order of the ranks. Every rank has to call it."""
    return [item for part in all_gather_object(own) for item in part]


def own_share(count: int) -> range:
    """Which of ``count`` batches this rank measures: every n-th one of n ranks."""
    rank, world_size = get_dist_info()
    return range(rank, count, world_size)
