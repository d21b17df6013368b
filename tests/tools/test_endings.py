"""Every tool ends every failure the same way: one line that says what to do, exit code 1, no traceback."""

from __future__ import annotations

import signal

import pytest
import torch
from helpers import CONFIGS, free_port, run_command, run_tool
from mmpretrain import get_model

ENC = str(CONFIGS / "digits" / "resnet8_enc-ws_1xb64.py")
PLAIN = str(CONFIGS / "digits" / "resnet8_1xb64.py")
FOLDER = 'dict(dataset=dict(_delete_=True, type="CustomDataset", data_root="/not/there", pipeline=[]))'


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Configs and checkpoints by what is wrong with them; the others work."""
    folder = tmp_path_factory.mktemp("files")
    configs = {
        "syntax": "model = dict(\n",
        "type": f'_base_ = {ENC!r}\nmodel = dict(type="ENCImageClasifier")\n',
        "data": f"_base_ = {ENC!r}\ntrain_dataloader = val_dataloader = test_dataloader = {FOLDER}\n",
        "preserve": f"_base_ = {ENC!r}\nmodel = dict(enc=dict(preserve=True))\n",
    }
    found = {"missing": "missing.py", "folder": str(folder), "enc": ENC, "plain": PLAIN, "no.pth": "no.pth"}
    for name, text in configs.items():
        (folder / f"{name}.py").write_text(text)
        found[name] = str(folder / f"{name}.py")
    for name, config in (("enc.pth", ENC), ("plain.pth", PLAIN)):
        torch.save(get_model(config, pretrained=False).state_dict(), folder / name)
        found[name] = str(folder / name)
    content = (folder / "enc.pth").read_bytes()
    (folder / "damaged.pth").write_bytes(content[: len(content) // 2])
    return found | {"damaged.pth": str(folder / "damaged.pth")}


TOOLS = {
    "train": lambda config, checkpoint: [config, "--work-dir", "run"],
    "test": lambda config, checkpoint: [config, checkpoint, "--work-dir", "run"],
    "measure_gbr": lambda config, checkpoint: [config, checkpoint, "--num-samples", "4", "--device", "cpu"],
    "attack": lambda config, checkpoint: [config, checkpoint, "--num-samples", "4", "--device", "cpu"],
    "fold": lambda config, checkpoint: [config, checkpoint, "out.pth", "--device", "cpu"],
}
CASES = {
    "missing": ("missing", "enc.pth", "config: there is no file missing.py"),
    "a folder": ("folder", "enc.pth", "is a folder; name a config file in it"),
    "syntax": ("syntax", "enc.pth", "cannot be read .SyntaxError"),
    "an unknown type": ("type", "enc.pth", "ENCImageClasifier is not in the mmpretrain::model registry"),
    "no data": ("data", "enc.pth", "data_root = '/not/there' does not exist|CustomDataset. cannot be read"),
    "no checkpoint": ("enc", "no.pth", "there is no file no.pth"),
    "a damaged checkpoint": ("enc", "damaged.pth", "is damaged"),
    "a plain checkpoint for an ENC config": ("enc", "plain.pth", "plain"),
    "an ENC checkpoint for a plain config": ("plain", "enc.pth", "ENC but plain in this model|nothing to fold"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("case", CASES)
def test_a_failure_is_one_line(case, tool, files, tmp_path, monkeypatch):
    config, checkpoint, message = CASES[case]
    if tool == "train" and config in ("enc", "plain"):
        pytest.skip("training takes no checkpoint here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as ended:
        run_tool(tool, TOOLS[tool](files[config], files[checkpoint]), monkeypatch)
    assert str(ended.value).startswith(f"{tool}: ")
    assert "\n" not in str(ended.value)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("tool", ["test", "measure_gbr", "attack"])
def test_preserve_makes_a_plain_checkpoint_fit_in_every_tool_that_measures(tool, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_tool(tool, TOOLS[tool](files["preserve"], files["plain.pth"]), monkeypatch)


@pytest.mark.parametrize("tool", TOOLS)
def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(tool, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stop.py").write_text('__import__("signal").raise_signal(2)\n')
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore the signal
    try:
        with pytest.raises(SystemExit) as ended:
            run_tool(tool, TOOLS[tool]("stop.py", files["enc.pth"]), monkeypatch)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == 130
    go_on = "with --resume to continue from the last checkpoint" if tool == "train" else "run it again"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{tool}: stopped; ")
    assert go_on in line


@pytest.mark.parametrize("tool", TOOLS)
def test_a_hook_on_the_command_line_is_refused_with_the_way_out(tool, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = TOOLS[tool](files["enc"], files["enc.pth"])
    with pytest.raises(SystemExit, match=r"--cfg-options: .*write a config of two lines: _base_ = .*custom_hooks = "):
        run_tool(tool, [*arguments, "--cfg-options", "custom_hooks=[dict(type='GBRHook')]"], monkeypatch)


def test_missing_archives_and_work_dirs_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^prepare_cifar10: archive: there is no file a.zip"):
        run_tool("prepare_cifar10", ["a.zip"], monkeypatch)
    with pytest.raises(SystemExit, match="^report: work_dir: nowhere is not a folder"):
        run_tool("report", ["nowhere"], monkeypatch)


def test_the_traceback_shows_on_request(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENC_VERBOSE", "1")
    with pytest.raises(FileNotFoundError, match="there is no file missing.py"):
        run_tool("measure_gbr", ["missing.py", files["enc.pth"]], monkeypatch)


def test_a_run_that_fails_keeps_the_traceback_in_its_log(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_tool("train", TOOLS["train"](files["data"], ""), monkeypatch)
    log = next(tmp_path.glob("run/*/*.log")).read_text()
    assert "The run has failed:\nTraceback (most recent call last):" in log


@pytest.mark.slow
def test_processes_end_together_and_one_speaks(tmp_path):
    config = tmp_path / "one.py"
    bad = '__import__("os").environ.get("RANK") == "1"'
    config.write_text(
        f"_base_ = {ENC!r}\ntrain_dataloader = dict(dataset=dict(split='nowhere' if {bad} else 'train'))\n"
    )
    command = ["bash", "tools/dist_train.sh", str(config), "2", "--work-dir", str(tmp_path / "run")]
    done = run_command(command, PORT=str(free_port()))
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("train: ")]
    assert len(errors) == 1, done.stderr
    assert "split: expected 'train' or 'test', got 'nowhere'" in errors[0]
    assert "Traceback" not in done.stderr
