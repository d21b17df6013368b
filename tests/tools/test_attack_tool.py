"""tools/attack.py on short digits runs: its figures against the hook's, its files, its refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONFIGS, digits_config, run_tool, scalars, train
from matplotlib.image import imread
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from enc_plugin.measuring.robustness import Robustness, measure_robustness
from enc_plugin.reports.attack_figures import _to_image, draw_accuracy, draw_pictures
from enc_plugin.reports.attack_report import Attacked, AttackReport, attack_checkpoints

NAMES = {"plain": "resnet8_1xb64", "ENC": "resnet8_enc-ws_1xb64"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Config and checkpoint of a plain and an ENC network, trained with the hook on."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = {}
    for name, config in NAMES.items():
        options = {"train_dataloader__dataset__indices": None, "val_dataloader__dataset__indices": None}
        cfg = digits_config(folder / name, config, epochs=2, **options)
        cfg.custom_hooks = [dict(type="FGSMHook", eps=[4, 32])]
        train(cfg)
        pairs[name] = (str(CONFIGS / "digits" / f"{config}.py"), str(folder / name / "epoch_2.pth"))
    return pairs


def test_tool_reports_what_the_hook_logged_and_writes_table_json_and_pictures(runs, tmp_path, monkeypatch, capsys):
    pairs = [argument for pair in runs.values() for argument in pair]
    options = ["--names", *runs, "--eps", "4", "32", "--pgd-steps", "3", "--out", str(tmp_path / "out")]
    run_tool("attack", [*pairs, *options], monkeypatch)

    report = json.loads((tmp_path / "out" / "attack.json").read_text())
    assert report["eps"] == [4, 32]
    assert [entry["name"] for entry in report["checkpoints"]] == list(runs)
    text = capsys.readouterr().out
    assert "checkpoint  weights      clean  FGSM 4  FGSM 32  PGD-3 4  PGD-3 32  zero grad" in text
    for entry, (_, checkpoint) in zip(report["checkpoints"], runs.values(), strict=True):
        logged = [line for line in scalars(Path(checkpoint).parent) if "fgsm/top1_clean" in line][-1]
        found = entry["result"]
        assert found["clean"] == logged["fgsm/top1_clean"]
        assert found["fgsm"] == {"4": logged["fgsm/top1_eps4"], "32": logged["fgsm/top1_eps32"]}
        assert found["zero_grad"] == logged["fgsm/zero_grad"]
        assert found["pgd"]["32"] <= found["fgsm"]["32"] < found["clean"]
        assert entry["meta"]["epoch"] == 2
        assert f"{entry['name']:10s}  in training  {found['clean']:.2f}" in text
        assert all(f"WARNING: {entry['name']}: {warning}" in text for warning in entry["warnings"])

    names = {"accuracy.png", "attack.json", "pictures_plain.png", "pictures_ENC.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names - {"attack.json"}:
        pixels = imread(tmp_path / "out" / name)[..., :3]
        assert min(pixels.shape[:2]) > 400
        assert 0.02 < (pixels < 0.9).any(-1).mean() < 0.9  # neither blank nor filled


def test_options_of_the_config_can_be_changed(runs, tmp_path, monkeypatch, capsys):
    options = ["test_dataloader.dataset.indices=30", "test_dataloader.batch_size=20"]
    arguments = [*runs["plain"], "--eps", "8", "--out", tmp_path, "--pictures", "0", "--cfg-options", *options]
    run_tool("attack", arguments, monkeypatch)
    text = capsys.readouterr().out
    assert "Top-1 accuracy (%) of 30 test samples, clean and under attack in pixel space; eps in 1/255 of" in text
    assert "of at most ±16.8" in text  # Wilson's interval of a half of 30
    assert {path.name for path in tmp_path.iterdir()} == {"accuracy.png", "attack.json"}


def test_config_without_its_checkpoint_is_refused(runs, monkeypatch):
    with pytest.raises(SystemExit, match="attack: checkpoints: expected CONFIG CHECKPOINT ..., got no checkpoint for"):
        run_tool("attack", [*runs["plain"], runs["ENC"][0]], monkeypatch)


def test_failure_is_one_line_without_a_traceback(runs, monkeypatch):
    with pytest.raises(SystemExit, match="attack: checkpoint: there is no file"):
        run_tool("attack", [runs["plain"][0], "missing.pth"], monkeypatch)


def test_names_come_from_configs_and_where_they_repeat_from_checkpoints(runs, tmp_path):
    config, checkpoint = runs["plain"]
    shutil.copy(checkpoint, tmp_path / "other.pth")
    few = dict(eps=[8], num_samples=8)
    different = attack_checkpoints(list(runs.values()), **few)
    assert [run.name for run in different.runs] == list(NAMES.values())
    assert different.files == []
    same = attack_checkpoints([(config, checkpoint), (config, tmp_path / "other.pth")], **few)
    assert [run.name for run in same.runs] == ["resnet8_1xb64 (epoch_2)", "resnet8_1xb64 (other)"]
    assert same.runs[0].result.fgsm == same.runs[1].result.fgsm
    assert same.runs[0].sha256 == same.runs[1].sha256


def test_repeated_names_are_refused(runs):
    with pytest.raises(ValueError, match="names: expected 2 different names, got 'a', 'a'"):
        attack_checkpoints(list(runs.values()), names=["a", "a"])


def test_checkpoint_of_another_network_is_refused(runs, tmp_path):
    content = torch.load(runs["plain"][1])
    del content["state_dict"]["head.fc.bias"]
    torch.save(content, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=r"with .*resnet8_1xb64.py: it does not fit .*head.fc.bias"):
        attack_checkpoints([(runs["plain"][0], tmp_path / "damaged.pth")])


def test_test_sets_of_different_length_are_refused(runs, tmp_path):
    short = digits_config(tmp_path, NAMES["plain"])
    short.test_dataloader.dataset.indices = 10
    with pytest.raises(ValueError, match="expected one test set for all"):
        attack_checkpoints([(short, runs["plain"][1]), runs["ENC"]], names=["short", "full"])


def test_warnings_name_their_checkpoint():
    poor = Robustness(100, 50.0, {8.0: 60.0}, {}, 0, 0.5, 1.0)
    report = AttackReport([Attacked("mine", "a.py", "a.pth", "", {}, poor)], [8.0], 0)
    assert "WARNING: mine: FGSM at eps 8 raises the accuracy" in str(report)
    assert "WARNING: mine: 50.0% of the samples have an all-zero gradient" in str(report)


def test_pictures_of_different_sizes_are_drawn_and_those_that_cannot_be_read_are_not(tmp_path):
    preprocessor = dict(type="mmpretrain.ClsDataPreprocessor", mean=[120.0] * 3, std=[60.0] * 3)
    model = MODELS.build(
        dict(type="mmpretrain.TimmClassifier", model_name="test_resnet", num_classes=4, data_preprocessor=preprocessor)
    )
    sizes = ((32, 32), (32, 40), (48, 32))
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    data = [{"inputs": image, "data_samples": DataSample().set_gt_label(1)} for image in images]
    assert measure_robustness(model, data, [4], batch_size=1).num_samples == 3
    draw_pictures(model, data, 4, tmp_path / "pictures.png")
    assert imread(tmp_path / "pictures.png").std() > 0
    draw_pictures(model, [None, *data], 4, tmp_path / "one.png", count=1)  # the first cannot be read
    assert imread(tmp_path / "one.png").std() > 0


def test_bgr_pixels_are_drawn_as_rgb():
    blue = torch.tensor([255.0, 0.0, 0.0])[:, None, None].expand(3, 2, 2)  # BGR, as mmcv reads
    assert _to_image(blue, flip=True)[0, 0].tolist() == [0.0, 0.0, 1.0]
    assert _to_image(blue, flip=False)[0, 0].tolist() == [1.0, 0.0, 0.0]
    assert _to_image(blue[:1], flip=True).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_curve_shows_every_checkpoint(tmp_path):
    def drawn(*names: str) -> np.ndarray:
        path = tmp_path / f"{'_'.join(names)}.png"
        levels = {"a": 80.0, "b": 60.0}
        results = {n: Robustness(100, 90.0, {8.0: levels[n]}, {8.0: levels[n] - 5}, 10, 0.0, 1.0) for n in names}
        draw_accuracy(results, path)
        return imread(path)

    one, both = drawn("a"), drawn("a", "b")
    assert one.shape == both.shape
    assert (one != both).any()
