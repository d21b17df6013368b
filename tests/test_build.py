"""From a config to its parts: what works, and the one line that says why something does not."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
from helpers import CONFIGS, build_runner, digits_config
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from enc_plugin.build import (
    build_dataset,
    build_model,
    config_file,
    load_config,
    make_dataset,
    pick_device,
    stack_pictures,
)
from enc_plugin.measuring.spread import spread
from enc_plugin.refused import Refused, describe

DIGITS = str(CONFIGS / "digits" / "resnet8_enc-ws_1xb64.py")


def test_configs_are_named_by_path_or_by_package(tmp_path):
    assert config_file(DIGITS) == DIGITS
    assert config_file("enc_plugin::digits/resnet8_enc-ws_1xb64") == DIGITS
    stock = load_config("mmpretrain::resnet/resnet18_8xb16_cifar10.py")
    assert stock.model.head.num_classes == 10
    assert load_config(stock, {"model.head.num_classes": 7}).model.head.num_classes == 7
    assert build_model(stock).head.fc.out_features == 7


BAD_CONFIGS = {
    "missing": (None, "there is no file .*; similar names: digits.py"),
    "empty": ("", "has no model; inherit from a config that has one"),
    "syntax": ("model = dict(\n", "cannot be read .SyntaxError.*; check the config's syntax"),
    "unfinished": ("model = dict(type=unknown)\n", "cannot be read .NameError.*unknown.*"),
    "base": ('_base_ = "gone.py"\n', "cannot be read .*gone.py.*; check the paths in `_base_`"),
    "imports": ('custom_imports = dict(imports=["no_such"])\n', "no_such.*; install the modules of custom_imports"),
    "a base of another kind": (
        '_base_ = "mmpretrain::replknet/replknet-31B_32xb64_in1k.py"\n',  # imports mmpretrain, for a main() of its own
        "cannot be read .*; `_base_` takes only configs without imports",
    ),
    "type": (
        'model = dict(type="ImageClasifier")\n',
        "KeyError: ImageClasifier is not in the .* registry",
    ),
    "test-time augmentation": (
        'model = dict(type="AverageClsScoreTTA", module=dict(type="TimmClassifier", model_name="test_resnet"))\n',
        "its model is AverageClsScoreTTA.*; name a config whose model is the network itself",
    ),
    "argument": (
        f"_base_ = {DIGITS!r}\nmodel = dict(backbone=dict(deep=True))\n",
        "its model cannot be built .*unexpected keyword argument 'deep'",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_gives_no_model_is_one_clear_line(case, tmp_path):
    text, message = BAD_CONFIGS[case]
    (tmp_path / "digits.py").touch()
    path = tmp_path / ("digit.py" if text is None else "bad.py")
    if text is not None:
        path.write_text(text)
    with pytest.raises((Refused, FileNotFoundError), match=f"^config: .*{message}") as refused:
        build_model(load_config(path))
    assert "\n" not in str(refused.value)


def test_a_folder_a_missing_package_and_options_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(Refused, match="is a folder; name a config file in it"):
        load_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="no installed package 'mmdetection'"):
        load_config("mmdetection::a.py")
    with pytest.raises(FileNotFoundError, match="mmpretrain has no config 'resnet/resnet18_gone.py'"):
        load_config("mmpretrain::resnet/resnet18_gone.py")
    with pytest.raises(Refused, match=r"^--cfg-options: custom_imports\.imports\.5 does not fit the config"):
        load_config(DIGITS, {"custom_imports.imports.5": "x"})


DATA = {
    "root": (
        dict(type="CustomDataset", data_root="/not/there"),
        "train_dataloader.dataset.data_root = '/not/there'",
    ),
    "inner root": (
        dict(type="RepeatDataset", times=2, dataset=dict(type="CustomDataset", data_root="/not/there")),
        r"--cfg-options train_dataloader\.dataset\.dataset\.data_root=PATH",
    ),
    "prepared": (
        dict(type="CIFAR10Folder", data_root="/not/there"),
        r"does not exist .*tools/prepare_cifar10.py",
    ),
    "empty": (dict(type="Digits", indices=[]), "train_dataloader: its dataset holds no sample"),
    "empty, not serialised": (dict(type="Digits", indices=[], serialize_data=False), "its dataset holds no sample"),
    "type": (dict(type="Digit"), "its dataset cannot be built .KeyError: Digit is not in"),
    "option": (dict(type="Digits", split="valid"), "split: expected 'train' or 'test', got 'valid'"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_is_not_there_is_one_clear_line(case, tmp_path):
    settings, message = DATA[case]
    cfg = digits_config(tmp_path, train_dataloader__dataset=dict(_delete_=True, pipeline=[], **settings))
    if "dataset" in settings:
        del cfg.train_dataloader.dataset["pipeline"]
    with pytest.raises(Refused, match=message) as refused:
        build_dataset(cfg, "train")
    assert "\n" not in str(refused.value)


def test_data_that_cannot_be_downloaded_is_one_clear_line():
    def unreachable():
        raise URLError("no network")

    with pytest.raises(Refused, match="no network.*could not be downloaded: put the data where train_dataloader"):
        make_dataset("train_dataloader", dict(type=unreachable))


def test_a_split_without_a_dataloader_is_named(tmp_path):
    cfg = digits_config(tmp_path)
    cfg.test_dataloader = None
    with pytest.raises(Refused, match="config: it has no test_dataloader with a dataset"):
        build_dataset(cfg, "test")
    assert len(build_dataset(cfg, "val")) == 64


def test_a_device_that_is_not_here_is_named():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None).type in ("cpu", "cuda")
    with pytest.raises(Refused, match="device: 'cuda:99' is not available .*leave it out, or use cpu"):
        pick_device("cuda:99")


@pytest.mark.parametrize(("length", "count"), [(15, 8), (9_999, 5_000), (7, 7), (7, 100), (3, 1), (50_000, 5_000)])
def test_evenly_spaced_indices_reach_from_end_to_end(length, count):
    indices = spread(length, count)
    assert len(indices) == min(length, count)
    gaps = {b - a for a, b in zip(indices, [*indices[1:], length], strict=True)}
    assert indices[0] == 0
    assert max(gaps) - min(gaps) <= 1


def test_errors_are_told_on_one_line():
    assert describe(KeyError("a b")) == "KeyError: a b"
    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    worker = "Caught X in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\nX: lost\n"
    assert describe(RuntimeError(worker)) == "X: lost"


def test_stacked_pictures_train_the_same_weights_bit_for_bit(tmp_path):
    weights = []
    for stacked in (False, True):
        cfg = digits_config(tmp_path / str(stacked))
        if stacked:
            stack_pictures(cfg)
        runner = build_runner(cfg)
        assert (runner.train_dataloader.collate_fn.func is not pseudo_collate) == stacked
        runner.train()
        weights.append(runner.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_a_way_to_collate_that_the_config_names_stays():
    cfg = Config(dict(train_dataloader=dict(collate_fn=dict(type="pseudo_collate")), val_dataloader=None))
    stack_pictures(cfg)
    assert cfg.train_dataloader.collate_fn.type == "pseudo_collate"
    assert cfg.val_dataloader is None
