"""Test a model with mmpretrain's tools/test.py, all its options, and enc_plugin imported."""

import _bootstrap

if __name__ == "__main__":
    with _bootstrap.one_line("test"):
        from enc_plugin.launch import run_mmpretrain_tool

        run_mmpretrain_tool("test.py")
