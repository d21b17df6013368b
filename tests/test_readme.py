"""The README's Python runs, its files exist, and its commands name real tools and options."""

from __future__ import annotations

import re
import shlex
import sys

import cv2
import numpy as np
import pytest
from helpers import CONFIGS, ROOT, run_command
from mmengine.config import Config
from mmengine.registry import DATASETS

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_in_order():
    namespace: dict = {}
    for language, code in BLOCKS:
        if language == "python" and "_base_ =" not in code:
            exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["values"].shape == (8,)


def test_config_blocks_build_an_enc_network(tmp_path):
    blocks = [code for language, code in BLOCKS if language == "python" and "_base_ =" in code]
    assert len(blocks) == 2
    for code in blocks:
        config = tmp_path / "readme.py"
        config.write_text(code.replace("./_base_", str(CONFIGS / "_base_")))
        cfg = Config.fromfile(config)
        assert cfg.model.type == "ENCImageClassifier"
        assert cfg.optim_wrapper.constructor == "ENCOptimWrapperConstructor"
        assert cfg.runner_type == "ENCRunner"
    # The last one, of one's own folders, reads them.
    for split, count in (("train", 3), ("val", 2)):
        for label in range(5):
            folder = tmp_path / "my" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(folder / f"{i}.png"), np.full((40, 40, 3), 10 * label + i, np.uint8))
    for loader, count in ((cfg.train_dataloader, 15), (cfg.val_dataloader, 10), (cfg.test_dataloader, 10)):
        loader.dataset.data_root = str(tmp_path / loader.dataset.data_root)
        with DATASETS.switch_scope_and_registry("mmpretrain") as registry:
            dataset = registry.build(loader.dataset)
        assert len(dataset) == count
        assert dataset[count - 1]["data_samples"].gt_label.item() == 4


COMMANDS = [line.split("#")[0].strip() for lang, code in BLOCKS if lang == "bash" for line in code.splitlines()]
TOOLS = [command for command in COMMANDS if command.startswith("python tools/")]


@pytest.mark.parametrize("command", TOOLS)
def test_tools_of_the_readme_know_their_options(command):
    words = shlex.split(command)
    done = run_command([sys.executable, words[1], "--help"])
    assert done.returncode == 0, done.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in done.stdout
    assert all((ROOT / word).exists() for word in words if word.startswith("configs/"))


def test_linked_files_exist():
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    paths = re.findall(r"`((?:tools|examples|configs|tests|bench)/[\w./-]+\.(?:py|sh))`", README)
    assert links
    missing = [path for path in links + paths if not (ROOT / path).exists()]
    assert not missing
