"""Compare training runs on one self-contained HTML page."""

import argparse

import _bootstrap

with _bootstrap.one_line("report"):
    from enc_plugin.reports.compare import write_report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dirs", nargs="+", help="work dirs of finished or running trainings")
    parser.add_argument("--names", nargs="+", help="one name for each run (default: the folder names)")
    parser.add_argument("--out", default="report.html", help="page to write (default: %(default)s)")
    parser.add_argument("--title", default="ENC report", help="heading of the page (default: %(default)s)")
    parser.add_argument(
        "--no-norms", action="store_true", help="leave out the norms of layers, which need models and checkpoints"
    )
    args = parser.parse_args()
    with _bootstrap.one_line("report"):
        print(write_report(args.work_dirs, args.out, args.names, args.title, norms=not args.no_norms))
        print(f"report: {args.out}")
