"""Train a model: mmpretrain's tools/train.py with all its flags, and the plugin's parts registered."""

import _bootstrap

if __name__ == "__main__":
    with _bootstrap.one_line("train", "run the same command with --resume to go on from the last checkpoint"):
        from enc_plugin.launch import run_mmpretrain_tool

        run_mmpretrain_tool("train.py")
