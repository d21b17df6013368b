"""Carry out runs of the study on one device, many side by side; by default those that are declared for a GPU."""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from lab import RESULTS, ROOT
from tools._bootstrap import one_line

if __name__ == "__main__":
    start = time.perf_counter()
    with one_line("side_by_side"):
        import torch

        from enc_plugin.build import pick_device
        from enc_plugin.functional.checks import check_integer
        from lab.side_by_side import prepare_process, train_in_processes, train_in_turns
        from lab.study import CELLS, load_grid, pending, runs_folder

    parser = argparse.ArgumentParser(prog="python -m lab.side_by_side", description=__doc__)
    parser.add_argument("grid", nargs="?", default=str(CELLS), help="default: lab/study/cells.py")
    parser.add_argument("--results", default=str(RESULTS / "study"), help="default: lab/results/study")
    parser.add_argument("--out", help="folder of the new results (default: that of the others, runs/ of --results)")
    parser.add_argument("--only", nargs="+", metavar="ARENA[/CELL]", help="patterns of arenas or cells")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop by then (default: when all is done)")
    parser.add_argument("--abreast", type=int, help="runs side by side (default: 8 on a GPU, else 1)")
    parser.add_argument("--processes", type=int, default=1, help="processes, each with so many runs (default: 1)")
    args = parser.parse_args()
    with one_line("side_by_side"):
        check_integer("abreast", args.abreast, 1, none="default")
        check_integer("processes", args.processes, 1)
        # To ask for a named GPU would use it here, where nothing trains if other processes do.
        several = args.processes > 1
        device = torch.device(args.device) if args.device and several else pick_device(args.device)
        grid = load_grid(args.grid)
        runs = grid.runs(args.only or grid.arenas_for(gpu=True))
    results = runs_folder(args.results)
    out = Path(args.out) if args.out else results
    todo = pending(pending(runs, results), out)
    print(f"{len(todo)} of {len(runs)} runs have no result yet; they train on {device}", flush=True)
    minutes = args.minutes - (time.perf_counter() - start) / 60
    abreast = args.abreast or (8 if device.type == "cuda" else 1)
    say = partial(print, flush=True)
    settings = dict(out=out, device=device, minutes=minutes, abreast=abreast, root=ROOT, say=say)
    failed = []
    if several:
        failed = train_in_processes(args.processes, todo, **settings)
    else:
        prepare_process(device)
        train_in_turns(todo, **settings)
    print(f"{len(pending(todo, out))} runs are left", flush=True)
    sys.exit(bool(failed))
