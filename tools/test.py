"""Test a model: mmpretrain's tools/test.py with all its flags, and the plugin's parts registered."""

import _bootstrap  # noqa: F401

from enc_plugin.launch import run_mmpretrain_tool

if __name__ == "__main__":
    run_mmpretrain_tool("test.py")
