"""Studies: a declared grid of runs, carried out one process a run, and what their results say of each claim."""

from .. import _needs_mmpretrain  # noqa: F401

# isort: split
from .execute import execute, pending, read_result, result_path
from .grid import Arena, Cell, Grid, PlannedRun, load_grid
from .plan import describe_plan, run_all
from .report import write_study

__all__ = [
    "Arena",
    "Cell",
    "Grid",
    "PlannedRun",
    "describe_plan",
    "execute",
    "load_grid",
    "pending",
    "read_result",
    "result_path",
    "run_all",
    "write_study",
]
