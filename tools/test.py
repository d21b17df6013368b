"""Test a model: mmpretrain's tools/test.py with all its flags, and the plugin's parts registered."""

import _bootstrap

if __name__ == "__main__":
    with _bootstrap.one_line("test"):
        from enc_plugin.launch import run_mmpretrain_tool

        run_mmpretrain_tool("test.py")
