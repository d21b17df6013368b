"""Train a plain and an ENC network on scikit-learn's digits and write work_dirs/demo/report.html."""

import argparse

import _bootstrap

with _bootstrap.one_line("demo"):
    from enc_plugin.demo import run_demo

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="work_dirs/demo", help="folder for the runs and the report")
    args = parser.parse_args()
    with _bootstrap.one_line("demo", "run it again to start from the beginning"):
        run_demo(args.out)
