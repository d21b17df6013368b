"""Work that is divided among the ranks of a distributed run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmengine.dist import all_gather_object, get_dist_info

from ..refused import describe

T = TypeVar("T")


def on_all_ranks(check: Callable[[], T]) -> T:
    """Run ``check`` on every rank. If it fails on one rank, all ranks raise, so that none waits forever.

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
    """Concatenate the lists of all ranks, in the order of the ranks. All ranks must call it."""
    return [item for part in all_gather_object(own) for item in part]


def own_share(count: int) -> range:
    """Which of ``count`` batches this rank measures: with n ranks, every n-th one."""
    rank, world_size = get_dist_info()
    return range(rank, count, world_size)
