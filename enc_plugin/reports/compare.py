"""Self-contained HTML report that compares training runs, from the logs in their work dirs."""

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
    different lengths. The page has no section for what no run logged. Equal logs give an equal page.

    Args:
        work_dirs: Work dirs of mmengine, one for each run.
        out: HTML file to write; its folder is created.
        names: Names of the runs in the report; default: the names of the folders.
        title: Heading of the page.
        norms: Build each run's model and load its last checkpoint to list the norms of its layers, and build its
            validation set to count the samples. If the model of a run cannot be built or loaded, the page says why.

    Returns:
        The summary table as plain text.

    Raises:
        FileNotFoundError: If a folder contains no run.
        ValueError: If there are no folders, or not one name for each.
    """
    names = list(names) if names is not None else default_names(work_dirs)
    if not work_dirs or len(names) != len(work_dirs):
        raise ValueError(
            f"names: expected at least one work dir and one name for each, got {len(work_dirs)} work dirs and "
            f"{len(names)} names"
        )
    runs = [load_run(work_dir, name) for work_dir, name in zip(work_dirs, names, strict=True)]
    if norms:
        for run in runs:
            run.count_validation_samples()
    # Plain networks come first, so that they have the same colours on all pages.
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
    """Origin of each run, as far as its log contains it."""
    keys = list(dict.fromkeys(key for run in runs for key in run.origin))
    rows = [[run.name, *(run.origin.get(key, "") for key in keys)] for run in runs]
    return [page.details("Where the runs come from", page.table(*filled(["run", *keys], rows)))] if keys else []
