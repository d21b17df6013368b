"""Studies: a declared grid of runs, carried out one process a run, and what their results say of each claim."""

from enc_plugin.installation import needs_mmpretrain  # noqa: F401

# isort: split
from .execute import execute, pending, read_result, result_path, runs_folder
from .grid import CELLS, Arena, Cell, Grid, PlannedRun, load_grid
from .pages import write_study
from .plan import describe_plan, run_all

__all__ = [
    "CELLS",
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
    "runs_folder",
    "write_study",
]
