"""Evenly spaced indices."""

from __future__ import annotations

from ..functional.checks import check_integer


def spread(length: int, num_samples: int | None) -> list[int]:
    """Evenly spaced indices of a dataset. (The first ones could all be of one class, if the dataset is sorted.)

    Args:
        length: Length of the dataset, at least 1.
        num_samples: Number of indices; None, or more than ``length``: all.

    Returns:
        Different indices, ascending from 0. The gaps between them, and to ``length``, differ by at most one.
    """
    if length == 0:
        raise ValueError("dataset: expected at least one sample, got none")
    check_integer("num_samples", num_samples, 1, none="all")
    count = length if num_samples is None else min(num_samples, length)
    return [i * length // count for i in range(count)]
