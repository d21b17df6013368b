"""Compare training runs on one self-contained HTML page: summary, curves, and the settings that differ."""

import argparse

import _bootstrap  # noqa: F401

from enc_plugin.report import write_report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dirs", nargs="+", help="folders that tools/train.py wrote to")
    parser.add_argument("--names", nargs="+", help="what the page calls the runs (default: the folders' names)")
    parser.add_argument("--out", default="report.html", help="page to write (default: %(default)s)")
    args = parser.parse_args()
    print(write_report(args.work_dirs, args.out, args.names))
    print(f"report: {args.out}")
