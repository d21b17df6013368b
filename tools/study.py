"""Carry out a study: every run of a declared grid that has no result yet, several side by side."""

import argparse
import sys
from pathlib import Path

import _bootstrap

with _bootstrap.one_line("study"):
    from enc_plugin import study
    from enc_plugin.study.plan import own_command

ROOT = Path(_bootstrap.__file__).resolve().parents[1]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grid", nargs="?", default=str(ROOT / "study" / "grid.py"), help="default: study/grid.py")
    parser.add_argument("--results", default=str(ROOT / "study" / "results"), help="default: study/results")
    parser.add_argument("--work-dir", default="work_dirs/study", help="checkpoints and logs (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="ARENA[/CELL]", help="patterns of arenas or cells (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default: %(default)s)")
    parser.add_argument("--retry-failed", action="store_true", help="do failed runs again")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost, and stop")
    parser.add_argument("--run", metavar="ID", help="carry out this one run, in this process")
    args = parser.parse_args()
    with _bootstrap.one_line("study"):
        runs = study.load_grid(args.grid).runs(args.only)
    if args.run is not None:
        chosen = [run for run in runs if run.id == args.run]
        if not chosen:
            sys.exit(f"study: the grid has no run {args.run!r}")
        sys.exit(study.execute(chosen[0], args.results, args.work_dir, ROOT)["status"] == "failed")
    print(study.describe_plan(runs, args.results), flush=True)
    if not args.dry_run:
        failed = study.run_all(
            runs,
            args.results,
            own_command(args.grid, args.results, args.work_dir),
            args.work_dir,
            workers=args.workers,
            threads=args.threads,
            retry_failed=args.retry_failed,
        )
        sys.exit(1 if failed else 0)
