"""Carry out the study: every run of the declared grid that has no result yet, several side by side."""

import argparse
import sys

from lab import RESULTS, ROOT
from tools._bootstrap import one_line

if __name__ == "__main__":
    with one_line("study"):
        import torch

        from lab import study
        from lab.study.plan import own_command

    parser = argparse.ArgumentParser(prog="python -m lab.study", description=__doc__)
    parser.add_argument("grid", nargs="?", default=str(study.CELLS), help="default: lab/study/cells.py")
    parser.add_argument("--results", default=str(RESULTS / "study"), help="default: lab/results/study")
    parser.add_argument("--work-dir", default="work_dirs/study", help="checkpoints and logs (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="ARENA[/CELL]", help="patterns (default: all but arenas for a GPU)"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs side by side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default: %(default)s)")
    parser.add_argument("--flush-denormals", action="store_true", help="numbers below 1e-38 are 0; the results say so")
    parser.add_argument("--retry-failed", action="store_true", help="do failed runs again")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost, and stop")
    parser.add_argument("--run", metavar="ID", help="carry out this one run, in this process")
    parser.add_argument("--pages", action="store_true", help="run nothing: write the pages from the results")
    parser.add_argument("--readme", metavar="FILE", help="with --pages: rewrite the verdicts in this file")
    args = parser.parse_args()
    with one_line("study"):
        if args.pages:
            for path in study.write_study(args.results, args.readme, args.grid):
                print(f"wrote {path}")
            sys.exit()
        grid = study.load_grid(args.grid)
        runs = grid.runs(args.only or grid.arenas_for(gpu=False))
    folder = study.runs_folder(args.results)
    if args.run is not None:
        chosen = [run for run in grid.runs() if run.id == args.run]
        if not chosen:
            sys.exit(f"study: the grid has no run {args.run!r}")
        if args.flush_denormals and not torch.set_flush_denormal(True):
            sys.exit("study: this processor cannot flush denormals; leave --flush-denormals out")
        sys.exit(study.execute(chosen[0], folder, args.work_dir, ROOT)["status"] == "failed")
    print(study.describe_plan(runs, folder), flush=True)
    if args.dry_run:
        sys.exit()
    command = own_command(args.grid, args.results, args.work_dir, args.flush_denormals)
    options = dict(workers=args.workers, threads=args.threads, retry_failed=args.retry_failed)
    sys.exit(bool(study.run_all(runs, folder, command, args.work_dir, **options)))
