"""What a user sees before the first iteration: real runs of tools/train.py, in a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest
from helpers import CONFIGS, ROOT, build_runner, digits_config, dist_train, run_command

import enc_plugin

ENC = "configs/digits/resnet8_enc-ws_1xb64.py"
SHORT = ["train_cfg.max_epochs=1", "train_dataloader.dataset.indices=192", "default_hooks.logger.interval=1"]
# A stock config with stock mmengine's runner, a line per parameter from the stock optimizer constructor, and data
# loaders that ask for pinned memory; trained with our tool on our pictures.
STOCK = """
_base_ = ["mmpretrain::resnet/resnet18_8xb16_cifar10.py"]
digits = dict(_delete_=True, type="Digits", split="train", indices=32, pipeline=[dict(type="PackInputs")])
train_dataloader = dict(batch_size=16, num_workers=0, persistent_workers=False, dataset=digits)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=digits)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.5))
model = dict(backbone=dict(base_channels=8), head=dict(in_channels=64))
"""
NOISE = ("MultiScaleDeformableAttention", "pin_memory", "FileClient", "HardDiskBackend", "CUDA_HOME", "Warning")


def train_command(config, work_dir, *options: str) -> list[str]:
    command = [sys.executable, "tools/train.py", str(config), "--work-dir", str(work_dir)]
    return [*command, "--cfg-options", *options] if options else command


def before_the_first_iteration(output: str) -> list[str]:
    head, found, _ = output.partition("Epoch(train)")
    assert found
    return head.splitlines()


@pytest.fixture(scope="module")
def enc_run(tmp_path_factory):
    """Work dir and output (both streams) of a run in a pipe."""
    work_dir = tmp_path_factory.mktemp("enc")
    options = (*SHORT, "train_dataloader.pin_memory=True", "train_dataloader.num_workers=2")
    done = run_command(["taskset", "-c", str(min(os.sched_getaffinity(0))), *train_command(ENC, work_dir, *options)])
    assert done.returncode == 0, done.stderr
    return work_dir, done.stdout + done.stderr


def test_an_enc_run_starts_in_forty_lines_without_noise(enc_run):
    output = enc_run[1]
    head = before_the_first_iteration(output)
    assert len(head) <= 40
    assert not [word for word in NOISE if word in output]
    assert sum("10 layers (ws, alpha 1), 1 with an added batch norm" in line for line in head) == 1
    assert sum("more data workers than cores (1): train_dataloader 2;" in line for line in head) == 1
    assert "\x1b" not in output  # plain lines in a pipe
    assert len(re.findall(r"Epoch\(train\) \[1\]\[\d/3\].*eta: .*loss: ", output)) == 3
    assert re.findall(r"Epoch\(val\) \[1\]\[3/3\] +(\S+)", output) == ["accuracy/top1:"]


def test_the_log_file_has_what_the_terminal_has_not(enc_run):
    work_dir, output = enc_run
    log = next(work_dir.glob("*/*.log"))
    assert str(log) in output
    text = log.read_text()
    for part in ("System environment:", "Config:\n", "Hooks will be executed in the following order:"):
        assert part in text
        assert part not in output
    assert len(text.splitlines()) > 200


def test_a_stock_config_under_the_stock_runner_starts_in_forty_lines(tmp_path):
    config = tmp_path / "stock.py"
    config.write_text(STOCK)
    done = run_command(train_command(config, tmp_path / "run", "default_hooks.logger.interval=1"))
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert len(before_the_first_iteration(output)) <= 40
    assert not [word for word in NOISE if word in output]
    assert "paramwise_options -- backbone.layer1.0.bn1.weight" in next(tmp_path.glob("run/*/*.log")).read_text()


@pytest.mark.slow
def test_everything_shows_on_request(tmp_path):
    done = run_command(train_command(ENC, tmp_path, *SHORT), ENC_VERBOSE="1")
    output = done.stdout + done.stderr
    assert len(before_the_first_iteration(output)) > 200
    assert "MultiScaleDeformableAttention" in output


@pytest.mark.slow
def test_two_processes_start_as_shortly_as_one(tmp_path):
    done = dist_train(ENC, 2, "--work-dir", str(tmp_path), "--cfg-options", *SHORT)
    output = done.stdout + done.stderr
    head = before_the_first_iteration(output)
    assert len(head) <= 40
    assert sum("10 layers (ws, alpha 1)" in line for line in head) == 1
    assert not [word for word in NOISE if word in output]


def test_a_terminal_shows_one_line_of_progress_with_the_time_left(tmp_path):
    main, terminal = pty.openpty()
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        train_command(ENC, tmp_path, *SHORT), cwd=ROOT, env=env, stdout=terminal, stderr=terminal, close_fds=True
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            output += os.read(main, 4096)
        except OSError:  # the other side is closed: the process has ended
            break
    os.close(main)
    text = output.decode()
    assert process.wait(60) == 0, text
    assert re.search(r"epoch 1/1  loss \S+ .*3/3.* left ", text)
    assert "\x1b[?25h" in text  # the cursor is back
    assert "Epoch(train)" not in text
    assert "Epoch(val)" in text
    assert next(tmp_path.glob("*/*.log")).read_text().count("Epoch(train)") == 3


def test_none_removes_the_runners_own_hooks(tmp_path):
    kinds = {"ENCAuditHook", "ProgressHook"}
    cfg = digits_config(tmp_path / "a")
    assert kinds <= {type(hook).__name__ for hook in build_runner(cfg).hooks}
    cfg.default_hooks.update(enc_audit=None, progress=None)
    assert not kinds & {type(hook).__name__ for hook in build_runner(cfg).hooks}


def test_config_path_finds_configs_and_names_near_ones():
    assert enc_plugin.config_path("digits/resnet8_enc-ws_1xb64") == str(ROOT / ENC)
    with pytest.raises(FileNotFoundError, match="there is no 'resnet50_8xb23.py'.* similar names: resnet50_8xb32.py"):
        enc_plugin.config_path("resnet50_8xb23.py")
    assert (CONFIGS / "resnet50_8xb32.py").is_file()
