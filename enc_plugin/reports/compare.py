"""Self-contained HTML report that compares training runs, from what mmengine wrote into their work dirs."""

from __future__ import annotations

from ..installation import needs_mmengine  # noqa: F401

# isort: split
from collections.abc import Sequence
from pathlib import Path

from ..table import format_table
from . import curves, page
from .norms import norms_section, read_norms
from .runs import Run, default_names, load_run
from .settings import settings_section
from .summary import cost, filled, measured, summary


def write_report(
    work_dirs: Sequence[str | Path],
    out: str | Path,
    names: Sequence[str] | None = None,
    title: str = "ENC report",
    *,
    norms: bool = True,
) -> str:
    """Compare runs on one HTML page that needs no other file.

    The runs may be of any kind: with or without this plugin, in progress, resumed, by epochs or by iterations, of
    different lengths. What no run logged has no place on the page. Equal logs give an equal page.

    Args:
        work_dirs: Folders that mmengine trained in, one a run.
        out: HTML file to write; its folder is made.
        names: What the report calls the runs; default: the folders' names.
        title: Heading of the page.
        norms: Build each run's model and load its last checkpoint for the norms of its layers, and its validation set
            for the number of samples that its accuracy is of. A run for which the first fails is named on the page,
            with the reason.

    Returns:
        The summary table as plain text.

    Raises:
        FileNotFoundError: If a folder holds no run.
        ValueError: If there are no folders, or not one name each.
    """
    names = list(names) if names is not None else default_names(work_dirs)
    if not work_dirs or len(names) != len(work_dirs):
        raise ValueError(f"names: expected one name a work dir, at least one; got {len(names)} for {len(work_dirs)}")
    runs = [load_run(work_dir, name) for work_dir, name in zip(work_dirs, names, strict=True)]
    if norms:
        for run in runs:
            run.count_validation_samples()
    # One colour a method on all pages: plain networks come first.
    drawn = sorted(runs, key=lambda run: run.is_enc)
    head, rows = summary(runs)
    sections = [
        page.section(
            "Summary", page.table(head, rows), *curves.warnings(runs), *_notes(runs), *measured(runs), *_origin(runs)
        ),
        *curves.sections(drawn),
        *norms_section(drawn, [read_norms(run) for run in drawn] if norms else []),
        cost(runs),
        *settings_section(runs),
        *curves.more(drawn),
    ]
    page.save_page(page.render(title, *sections), out)
    return format_table(head, rows)


def _notes(runs: Sequence[Run]) -> list[page.Html]:
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    return [page.items(*notes)] if notes else []


def _origin(runs: Sequence[Run]) -> list[page.Html]:
    """Where each run comes from, as far as its log tells."""
    keys = list(dict.fromkeys(key for run in runs for key in run.origin))
    rows = [[run.name, *(run.origin.get(key, "") for key in keys)] for run in runs]
    return [page.details("Where the runs come from", page.table(*filled(["run", *keys], rows)))] if keys else []
