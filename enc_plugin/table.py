"""Plain-text tables, shortened lists and rounded numbers."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Table with left-aligned columns, one line per row."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    )


def first_few(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names, separated by commas, and ``...`` if there are more."""
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])


def two_digits(value: float) -> str:
    """The number with two significant digits, and without an exponent from 0.0001 to a million: 0.39, 33, 120."""
    return f"{float(f'{value:.2g}'):g}"
