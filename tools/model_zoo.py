"""Measure the configs' networks and write their sizes into configs/**/README.md and configs/metafile.yml."""

import argparse
from pathlib import Path

import _bootstrap

with _bootstrap.one_line("model_zoo"):
    from enc_plugin.zoo import update

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is out of date")
    check = parser.parse_args().check
    with _bootstrap.one_line("model_zoo"):
        changed = update(Path(__file__).resolve().parents[1] / "configs", write=not check)
    for path in changed:
        print(f"{'out of date' if check else 'written'}: {path}")
    raise SystemExit(bool(changed) and check)
