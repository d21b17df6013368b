"""Indices of samples that represent a dataset in any order."""

from __future__ import annotations

from ..functional.checks import check_integer

_GOLDEN = (5**0.5 - 1) / 2


def spread(length: int, num_samples: int | None) -> list[int]:
    """Evenly spaced indices of a dataset. (The first ones could all be of one class, if the dataset is sorted.)

    Args:
        length: Length of the dataset, at least 1.
        num_samples: Number of indices; None, or more than ``length``: all.

    Returns:
        Different indices, ascending from 0. The gaps between them, and to ``length``, differ by at most one.
    """
    return [start for start, _ in _sections(length, num_samples)]


def one_of_each_section(length: int, num_samples: int | None) -> list[int]:
    """An index of each of ``num_samples`` sections of a dataset, always the same one.

    Of a dataset whose classes take turns, :func:`spread` can choose one class alone. Here the place within the section
    changes by the golden ratio, whose multiples fill it evenly.

    Args:
        length, num_samples: As for :func:`spread`.

    Returns:
        Different indices, ascending.
    """
    sections = _sections(length, num_samples)
    return [start + int(k * _GOLDEN % 1 * (end - start)) for k, (start, end) in enumerate(sections)]


def _sections(length: int, num_samples: int | None) -> list[tuple[int, int]]:
    """Start and end of sections whose lengths differ by at most one."""
    if length == 0:
        raise ValueError("dataset: expected at least one sample, got none")
    check_integer("num_samples", num_samples, 1, none="all")
    count = length if num_samples is None else min(num_samples, length)
    return [(i * length // count, (i + 1) * length // count) for i in range(count)]
