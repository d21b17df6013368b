import hashlib
import json
import shutil

import pytest
import torch
from helpers import ROOT, digits_config, run_tool, scalars, train

import enc_plugin
from enc_plugin.build import load_config
from enc_plugin.reports.gbr_report import lines, measure_checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Work dir of a run of two epochs with a hook that measured exactly on 40 samples."""
    work_dir = tmp_path_factory.mktemp("run")
    hook = dict(type="GBRHook", num_samples=40, batch_size=40, projections=None)
    cfg = digits_config(work_dir, epochs=2, custom_hooks=[hook])
    train(cfg)
    cfg.dump(work_dir / "config.py")
    return work_dir


def test_the_tool_repeats_what_the_hook_logged_and_writes_json_and_a_curve(finished, monkeypatch, capsys):
    checkpoints = [str(finished / f"epoch_{epoch}.pth") for epoch in (2, 1)]
    options = ["--num-samples", "40", "--outputs", "logits", "probs", "--out", str(finished / "out" / "gbr.json")]
    run_tool("measure_gbr", [finished / "config.py", *checkpoints, *options], monkeypatch)
    printed = capsys.readouterr().out
    written = json.loads((finished / "out" / "gbr.json").read_text())
    assert written["num_samples"] == 40
    assert {r["unit"] for r in written["results"]} == {"per squared standard deviation of the input"}
    assert [(r["epoch"], r["output"]) for r in written["results"]] == [
        (2, "logits"),
        (2, "probs"),
        (1, "logits"),
        (1, "probs"),
    ]
    assert (written["enc_plugin"], written["torch"]) == (enc_plugin.__version__, torch.__version__)
    for path, measured in zip(checkpoints, written["checkpoints"], strict=True):
        with open(path, "rb") as file:
            assert measured["sha256"] == hashlib.sha256(file.read()).hexdigest()
        meta = torch.load(path)["meta"]
        assert measured["checkpoint"] == path
        kept = {key: meta[key] for key in ("epoch", "iter", "seed", "experiment_name")}
        assert measured["meta"] == kept | {"weights": "in training"}
    logged = {line["step"]: line for line in scalars(finished) if "gbr/logits" in line}
    for record in written["results"]:
        if record["output"] == "logits":
            assert record["gbr"] == pytest.approx(logged[record["epoch"]]["gbr/logits"], rel=1e-5)
            assert record["sem"] == pytest.approx(logged[record["epoch"]]["gbr/logits_sem"], rel=1e-4)
            assert f"{record['gbr']:.6g}" in printed
    assert (finished / "out" / "gbr.png").read_bytes().startswith(b"\x89PNG")


def test_one_checkpoint_gives_a_table_and_no_curve(finished, tmp_path):
    options = dict(num_samples=10, space="pixel", projections=1, out=tmp_path / "gbr.json")
    report = measure_checkpoints([(finished / "config.py", finished / "epoch_1.pth")], **options)
    assert [record["epoch"] for record in report.records] == [1]
    about, head, row = str(report).splitlines()
    assert "over 10 training samples, per squared gray level, 1/255 of the pixel range (space 'pixel'" in about
    assert head.split() == [
        "checkpoint",
        "epoch",
        "weights",
        "output",
        "GBR",
        "95",
        "%",
        "interval",
        "median",
        "seconds",
    ]
    assert json.loads((tmp_path / "gbr.json").read_text())["results"] == report.records
    (record,) = report.records
    assert record["low"] < record["gbr"] < record["high"]
    assert f"{record['low']:.4g} to {record['high']:.4g}" in row
    assert not (tmp_path / "gbr.png").exists()


def test_checkpoints_of_several_configs_each_have_their_line(finished, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from _bootstrap import read_checkpoints

    shutil.copy(finished / "config.py", tmp_path / "other.py")
    one, two = (str(finished / f"epoch_{epoch}.pth") for epoch in (1, 2))
    configs = (str(finished / "config.py"), str(tmp_path / "other.py"))
    pairs = read_checkpoints([configs[0], one, two, configs[1], two], None)
    expected = [(configs[0], one), (configs[0], two), (configs[1], two)]
    assert [(config.filename, path) for config, path in pairs] == expected
    report = measure_checkpoints(pairs, num_samples=10, plot=tmp_path / "gbr.png")
    assert [record["config"] for record in report.records] == [configs[0], configs[0], configs[1]]
    assert report.records[1]["gbr"] == report.records[2]["gbr"]
    named = "mmpretrain::resnet/resnet18_8xb16_cifar10"
    for arguments in (
        [configs[0]],
        [configs[0], configs[1], one],
        [configs[0], one, configs[1]],
        [configs[0], named, one],
    ):
        with pytest.raises(ValueError, match="expected CONFIG CHECKPOINT ..., got no checkpoint for"):
            read_checkpoints(arguments, None)


def test_runs_of_one_config_have_names_and_lines_of_their_own(finished, tmp_path):
    config = finished / "config.py"
    checkpoints = [tmp_path / seed / f"epoch_{epoch}.pth" for seed in ("seed0", "seed1") for epoch in (1, 2)]
    for checkpoint in checkpoints:
        checkpoint.parent.mkdir(exist_ok=True)
        shutil.copy(finished / checkpoint.name, checkpoint)
    report = measure_checkpoints([(config, checkpoint) for checkpoint in checkpoints], num_samples=4, projections=1)
    names = [line.split()[0] for line in str(report).splitlines()[2:]]
    assert names == ["seed0/epoch_1.pth", "seed0/epoch_2.pth", "seed1/epoch_1.pth", "seed1/epoch_2.pth"]
    assert [(line.name, line.x) for line in lines(report.records)] == [
        ("seed0, logits", [1, 2]),
        ("seed1, logits", [1, 2]),
    ]


def test_changes_of_one_config_are_read_as_different_data(finished):
    checkpoint = finished / "epoch_1.pth"
    changes = [{"train_dataloader.dataset.indices": indices} for indices in (50, 100)]
    pairs = [(load_config(finished / "config.py", change), checkpoint) for change in changes]
    report = measure_checkpoints(pairs, num_samples=None, projections=1)
    assert [record["samples"] for record in report.records] == [50, 100]
    assert "over 50 or 100 training samples" in str(report)
    both = [record["gbr"] for record in measure_checkpoints(pairs, num_samples=10, projections=1).records]
    alone = [measure_checkpoints([pair], num_samples=10, projections=1).records[0]["gbr"] for pair in pairs]
    assert both == alone
    assert both[0] != both[1]


def test_a_config_without_test_pipeline_is_refused(finished):
    from mmengine.config import Config

    cfg = Config.fromfile(finished / "config.py")
    cfg.val_dataloader = cfg.test_dataloader = None
    with pytest.raises(ValueError, match="config: neither val_dataloader nor test_dataloader"):
        measure_checkpoints([(cfg, finished / "epoch_1.pth")])


def test_a_checkpoint_that_does_not_fit_is_refused(finished, tmp_path):
    content = torch.load(finished / "epoch_1.pth")
    content["state_dict"] = {f"net.{key}": value for key, value in content["state_dict"].items()}
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"checkpoint: .*other.pth with .*config.py: it does not fit .*backbone"):
        measure_checkpoints([(finished / "config.py", tmp_path / "other.pth")], num_samples=2)
