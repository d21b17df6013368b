"""Train a model with mmpretrain's tools/train.py, all its options, and enc_plugin imported."""

import _bootstrap

if __name__ == "__main__":
    with _bootstrap.one_line("train", "run the same command with --resume to continue from the last checkpoint"):
        from enc_plugin.launch import run_mmpretrain_tool

        run_mmpretrain_tool("train.py")
