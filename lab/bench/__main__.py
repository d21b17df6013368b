"""Run the benchmarks section by section; write <section>.json, <section>.png and README.md to lab/results/bench."""

import argparse
import importlib
import inspect
import sys
import time
from pathlib import Path

from lab import RESULTS


def section_names() -> list[str]:
    """Names of the modules in this folder with a function ``run``."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef run(" in path.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lab.bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=section_names(), help="sections to run (default: all)")
    parser.add_argument("--rounds", type=int, help="rounds of each timing (default: depends on the section)")
    parser.add_argument("--minutes", type=float, help="time limit of sections that have one, such as gpu")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench", help="default: lab/results/bench")
    parser.add_argument("--readme", action="store_true", help="only write charts and README.md again, run nothing")
    parser.add_argument("--list", action="store_true", help="list the sections and exit")
    args = parser.parse_args()
    if args.list:
        print("\n".join(section_names()))
        sys.exit()
    import torch

    from .output import draw_ratios, readme, write_section

    torch.set_num_threads(1)  # times are for one thread, unless a section says otherwise
    options = {key: getattr(args, key) for key in ("rounds", "minutes") if getattr(args, key) is not None}
    for name in [] if args.readme else args.only or section_names():
        start = time.perf_counter()
        path = args.results / f"{name}.json"
        module = importlib.import_module(f"lab.bench.{name}")
        if getattr(module, "NEEDS_CUDA", False) and not torch.cuda.is_available():
            print(f"{name}: skipped, because there is no CUDA device", flush=True)
            continue
        taken = inspect.signature(module.run).parameters
        found = module.run(**{key: value for key, value in options.items() if key in taken})
        for result in [found] if isinstance(found, dict) else found:  # iterators are saved after each part
            write_section(path, result)
            print(f"{name}: {path} ({time.perf_counter() - start:.0f} s)", flush=True)
    if args.readme:
        for path in args.results.glob("*.json"):
            draw_ratios(path)
    (args.results / "README.md").write_text(readme(args.results))
