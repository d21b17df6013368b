"""Train a model: mmpretrain's tools/train.py with all its flags, and the plugin's parts registered."""

import shlex
import sys

import _bootstrap

if __name__ == "__main__":
    again = [*sys.argv, *([] if "--resume" in sys.argv else ["--resume"])]
    with _bootstrap.one_line("train", f"to go on from the last checkpoint: python {shlex.join(again)}"):
        from enc_plugin.launch import run_mmpretrain_tool

        run_mmpretrain_tool("train.py")
