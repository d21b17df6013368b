"""Carry out runs of the study on one device, many side by side; by default those that are declared for a GPU."""

import argparse
import sys
from pathlib import Path

from lab import RESULTS, ROOT
from tools._bootstrap import one_line

if __name__ == "__main__":
    with one_line("side_by_side"):
        import torch
        from mmengine.logging import MMLogger

        from enc_plugin.build import pick_device
        from lab.side_by_side import train_in_turns
        from lab.study import CELLS, load_grid, pending, runs_folder

    parser = argparse.ArgumentParser(prog="python -m lab.side_by_side", description=__doc__)
    parser.add_argument("grid", nargs="?", default=str(CELLS), help="default: lab/study/cells.py")
    parser.add_argument("--results", default=str(RESULTS / "study"), help="default: lab/results/study")
    parser.add_argument("--out", help="folder of the new results (default: that of the others, runs/ of --results)")
    parser.add_argument("--only", nargs="+", metavar="ARENA[/CELL]", help="patterns of arenas or cells")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop by then (default: when all is done)")
    parser.add_argument("--abreast", type=int, help="runs side by side (default: 8 on a GPU, else 1)")
    args = parser.parse_args()
    with one_line("side_by_side"):
        device = pick_device(args.device)
        grid = load_grid(args.grid)
        runs = grid.runs(args.only or grid.arenas_for(gpu=True))
    MMLogger.get_current_instance().setLevel("WARNING")  # else each network's initial weights are listed
    results = runs_folder(args.results)
    out = Path(args.out) if args.out else results
    todo = pending(pending(runs, results), out)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # sizes of pictures and batches stay the same
    print(f"{len(todo)} of {len(runs)} runs have no result yet; they train on {device}", flush=True)
    abreast = args.abreast or (8 if device.type == "cuda" else 1)
    left = train_in_turns(todo, out, device, args.minutes, abreast, ROOT, lambda text: print(text, flush=True))
    print(f"{len(left)} runs are left", flush=True)
    sys.exit()
