"""Plain text: tables, and lists that may be long."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain-text table with left-aligned, padded columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    )


def first_few(names: Sequence[str], most: int = 5) -> str:
    """The first of ``names``, with ``...`` in the place of those beyond ``most``."""
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])
