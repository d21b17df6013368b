"""Evenly spaced indices."""

from __future__ import annotations

from ..functional.checks import check_integer


def spread(length: int, num_samples: int | None) -> list[int]:
    """Evenly spaced indices into a dataset: the first ones would be a single class where the dataset is sorted.

    Args:
        length: Of the dataset, at least 1.
        num_samples: How many; None, or more than there are: all.

    Returns:
        Different indices, ascending from 0; the gaps between them, and to ``length``, differ by at most one.
    """
    if length == 0:
        raise ValueError("dataset: expected at least one sample, got none")
    check_integer("num_samples", num_samples, 1, none="all")
    count = length if num_samples is None else min(num_samples, length)
    return [i * length // count for i in range(count)]
