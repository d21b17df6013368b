"""The answer of a study on one screen: claim by arena, one word and one effect each, and what the columns are."""

from __future__ import annotations

from collections.abc import Sequence

from enc_plugin.table import two_digits

from .agreement import agree
from .claims import NOT_TESTED
from .figures import Figure
from .grid import cell_efolds
from .results import Results
from .sections import Section
from .verdicts import MEANING, MIN_SEEDS

WORDS = (
    "Each cell has one word, and ENC's effect with its 95 % interval over seeds: "
    + "; ".join(f"*{word}*: {meaning}" for word, meaning in MEANING.items())
    + ". ENC is 'ws' (eq. 22) with its batch norm behind the classifier."
)
METHOD = (
    "Effects are differences of cell means with Welch's intervals, because cells may differ in spread and number of "
    "seeds. Runs of the same seed are not paired, because their results are hardly correlated. A ratio (x) compares "
    'geometric means. Intervals are not corrected for their number. "So far": the arena has runs to go. Each word '
    f"needs at least {MIN_SEEDS} seeds. Claims, effects and words were declared before the runs of the arena overfit "
    "and of those for a GPU (g0 to g5), and after those of the other three. The networks and schedules are far smaller "
    "than the paper's, so the words are about this scale."
)


def summary_table(found: Results, parts: Sequence[Section], again: bool = True) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row a claim, and last a row of what has not been tested.

    Where an arena for a GPU is complete, it stands in the place of those that ask the same with less. These have no
    column if nothing else is left in it.

    Args:
        found: The results.
        parts: Sections of the page; those of claims count.
        again: Whether arenas that ask the questions of another one again have a column.
    """
    claims = [part for part in parts if part.verdicts]
    columns = {}
    for arena in (name for name in found.arenas if again or not found.grid.arenas[name].again):
        cells = [_seen_in_full(found, part, arena) or str(part.verdicts.get(arena, "")) for part in claims]
        if any(cell and not cell.startswith("see ") for cell in cells):
            columns[f"{arena} so far" if arena in found.unfinished else arena] = cells
    papers = [part.claim.removeprefix("The paper: ").rstrip(".") for part in claims]
    rows = [[part.title, paper, *row] for part, paper, *row in zip(claims, papers, *columns.values(), strict=True)]
    return ["claim", "paper", *columns], [*rows, ["Not tested", NOT_TESTED, *[""] * len(columns)]]


def _seen_in_full(found: Results, part: Section, arena: str) -> str:
    """ "see ..." if a complete arena asks the same with more; "" if there is none."""
    complete = set(found.grid.arenas) - found.unfinished
    for name, other in found.grid.arenas.items():
        if arena in other.instead_of and name in complete and {name, arena} <= set(part.verdicts) and agree(found):
            return f"see {name}"
    return ""


def opening_figure(parts: Sequence[Section]) -> list[Figure]:
    """The figure beside the table: all cells of the first arena that has any; none without runs."""
    return [figure for part in parts for figure in part.figures if figure.kind == "intervals"][:1]


def arena_lines(found: Results) -> list[str]:
    """The columns: what they train on, and how much weight decay acts on the plain network there."""
    lines = []
    for name, arena in found.grid.arenas.items():
        efolds = cell_efolds(found.grid.cells[name][0])
        none = "" if found.of_arena(name) else "; not run yet"
        lines.append(f"{name}: {arena.title}; {two_digits(efolds)} e-folds of decay (the paper: 33){none}")
    return lines


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    first, *others = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (head, *rows))
    return [first, f"|{'---|' * len(head)}", *others]


def headlines(found: Results, parts: Sequence[Section]) -> str:
    """The table for the project's README, in Markdown: of the paper's results, only the first thing that is said.

    Arenas that ask the questions of another one again have no column.
    """
    head, rows = summary_table(found, parts, again=False)
    short = [[row[0], _first_clause(row[1]), *row[2:]] for row in rows]
    return "\n".join(markdown_table(head, short))


def _first_clause(text: str) -> str:
    first = text.split(";")[0]
    return first + ")" * (first.count("(") - first.count(")"))
