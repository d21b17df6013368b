"""Print what ENC does on every architecture as a Markdown table; names, or parts of them, select some.

python tests/architectures/print_table.py [--reports] [NAME ...]
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from architectures.catalogue import ARCHITECTURES  # noqa: E402
from architectures.properties import COLUMNS, StockCannot, Subject  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of the architectures to try; none: all")
    parser.add_argument("--reports", action="store_true", help="also print what to_enc warned of and left plain")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="what to try; none: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"| network | library | {' | '.join(args.columns)} |\n|{'---|' * (len(args.columns) + 2)}")
    notes = []
    for architecture in ARCHITECTURES:
        if args.names and not any(name in architecture.id for name in args.names):
            continue
        subject, cells, start = Subject(architecture), [], time.perf_counter()
        name = architecture.id.partition("-")[2]
        for column in args.columns:
            cell, note = outcome(COLUMNS[column], subject)
            cells.append(cell)
            if note:
                notes.append(f"- {architecture.id}, {column}: {note}")
        print(f"| {name} | {architecture.library} | {' | '.join(cells)} |", flush=True)
        print(f"{architecture.id}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        if args.reports and outcome(COLUMNS["ENC layers"], subject)[1] == "":
            notes += [f"- {architecture.id} warns: {text}" for text in subject.warnings]
            notes += [f"- {architecture.id} leaves plain: {x} ({why})" for x, why in subject.report.skipped.items()]
    print("\n" + "\n".join(notes))


def outcome(measure, subject: Subject) -> tuple[str, str]:
    """The cell of one column, and the note that explains a cell that is no success."""
    try:
        return measure(subject), ""
    except StockCannot as error:
        return "stock cannot", f"stock: {error}"
    except Exception as error:
        return "**fails**", f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


if __name__ == "__main__":
    main()
