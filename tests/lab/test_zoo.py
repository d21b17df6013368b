"""Tables of the configs: filled from built models alone, and the committed ones are up to date."""

from __future__ import annotations

import runpy
import sys

import pytest
from helpers import CONFIGS

from lab.zoo import fill_tables


def test_tables_are_filled_from_the_built_model_alone(tmp_path):
    text = (
        "| config | params (M) | GFLOPs | paper |\n| --- | --- | --- | --- |\n| [x](resnet8.py) | 9 | 9 | 7 |\n\nend\n"
    )
    (tmp_path / "resnet8.py").write_text(f"_base_ = '{CONFIGS / 'digits' / 'resnet8_enc-ws_1xb64.py'}'\n")
    filled = fill_tables(text, tmp_path).splitlines()
    assert filled[2].startswith("| [x](resnet8.py) | 0.08 | ")
    assert filled[2].endswith(" | 7 |")
    assert filled[3:] == ["", "end"]


@pytest.mark.slow
def test_the_committed_sizes_are_those_of_the_built_models(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lab.zoo", "--check"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("lab.zoo", run_name="__main__")
    assert not end.value.code, capsys.readouterr().out
