"""tools/fold.py and its library call: a stock checkpoint that was checked, or a clear error and no file."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers import CONFIGS, ROOT, digits_config, run_tool, train
from mmengine.config import Config
from mmpretrain import get_model
from mmpretrain.models import ImageClassifier
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from surgery.test_fold import randomize_norms

import enc_plugin.deploy as deploy
from enc_plugin.checkpoint import read_checkpoint
from enc_plugin.deploy import fold_checkpoint, stock_config

CONFIG = ROOT / "configs" / "digits" / "resnet8_enc-ws_1xb64.py"
STOCK = ROOT / "configs" / "digits" / "resnet8_1xb64.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of the ENC config after a few real steps, and the model."""
    folder = tmp_path_factory.mktemp("enc")
    runner = train(digits_config(folder))
    return folder / "epoch_1.pth", runner.model.eval()


def save_untrained(cfg: Config, path):
    """A checkpoint of the config's model whose statistics let the outputs depend on the inputs, as after training."""
    model = get_model(cfg, pretrained=False)
    randomize_norms(model)
    torch.save(model.state_dict(), path)
    return path


def rewrite(source, target, change):
    """A copy of a checkpoint with its state dict changed."""
    checkpoint = torch.load(source, weights_only=True)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, target)
    return target


def test_the_result_is_a_stock_checkpoint_with_the_outputs_of_the_enc_network(trained, tmp_path):
    checkpoint, model = trained
    report = fold_checkpoint(CONFIG, checkpoint, tmp_path / "stock.pth")
    assert (report.layers, report.samples, report.settings) == (10, 8, ["ws, alpha 1.0"])
    assert report.error < 1e-5

    written = torch.load(tmp_path / "stock.pth", weights_only=True)
    stock = get_model(str(STOCK), pretrained=False)
    assert type(stock) is ImageClassifier
    stock.load_state_dict(written["state_dict"], strict=True)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(x), model(x), rtol=1e-4, atol=1e-5)

    meta = written["meta"]
    assert meta["epoch"] == 1
    assert meta["dataset_meta"]["classes"][3] == "3"
    assert meta["enc_fold"]["source"] == "epoch_1.pth"
    assert len(meta["enc_fold"]["source_sha256"]) == 64
    own_config = Config.fromstring(meta["cfg"], ".py")
    assert own_config.model.type == "ImageClassifier"
    get_model(own_config, pretrained=str(tmp_path / "stock.pth"))
    assert os.listdir(tmp_path) == ["stock.pth"]


def test_safetensors_in_and_out(trained, tmp_path):
    checkpoint, _ = trained
    save_file(torch.load(checkpoint, weights_only=True)["state_dict"], tmp_path / "enc.safetensors")
    report = fold_checkpoint(CONFIG, tmp_path / "enc.safetensors", tmp_path / "stock.safetensors", safetensors=True)
    assert report.error < 1e-5
    get_model(str(STOCK), pretrained=False).load_state_dict(load_file(tmp_path / "stock.safetensors"), strict=True)
    with safe_open(tmp_path / "stock.safetensors", "pt") as file:
        assert json.loads(file.metadata()["meta"])["enc_fold"]["layers"] == 10
    plain_mode = (tmp_path / "enc.safetensors").with_name("touch")
    plain_mode.touch()
    assert (tmp_path / "stock.safetensors").stat().st_mode == plain_mode.stat().st_mode


def in_ddp(state, folder):
    torch.save({"model": {f"module._orig_mod.{key}": value for key, value in state.items()}}, folder / "enc.pth")
    return folder / "enc.pth"


def in_ddp_compiled(state, folder):
    torch.save({f"_orig_mod.module.{key}": value for key, value in state.items()}, folder / "enc.pth")
    return folder / "enc.pth"


def in_half_precision_of_an_average(state, folder):
    state = {key: value.bfloat16() if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"state_dict_ema": state, "epoch": 3}, folder / "enc.pth")
    return folder / "enc.pth"


def in_shards(state, folder):
    keys = sorted(state)
    parts = {"enc-00001.safetensors": keys[:9], "enc-00002.safetensors": keys[9:]}
    for name, part in parts.items():
        save_file({key: state[key] for key in part}, folder / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "enc.safetensors.index.json").write_text(json.dumps(index))
    return folder / "enc.safetensors.index.json"


@pytest.mark.filterwarnings("error::enc_plugin.CheckpointWarning")
@pytest.mark.parametrize("write", [in_ddp, in_ddp_compiled, in_half_precision_of_an_average, in_shards])
def test_checkpoints_of_other_trainers_fold(trained, tmp_path, write):
    path = write(read_checkpoint(trained[0])[0], tmp_path)
    assert fold_checkpoint(CONFIG, path, tmp_path / "stock.pth").layers == 10


@pytest.mark.filterwarnings("error::enc_plugin.CheckpointWarning")
def test_safetensors_of_a_run_with_preserve_fold_into_the_network_that_was_saved(tmp_path):
    cfg = Config.fromfile(CONFIG)
    cfg.model.enc = dict(variant="wn", preserve=True)
    source = get_model(cfg, pretrained=False)
    randomize_norms(source)
    save_file(source.state_dict(), tmp_path / "enc.safetensors")
    fold_checkpoint(cfg, tmp_path / "enc.safetensors", tmp_path / "stock.pth")
    stock = get_model(str(STOCK), pretrained=str(tmp_path / "stock.pth"))
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(x), source.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "post_norm"),
    [
        (dict(variant="wn", alpha=2.0), True),
        (dict(variant="fro", alpha="learnable", post_norm=False), False),
        (dict(variant="centered_fro", exclude="head"), False),
    ],
)
def test_every_setting_of_the_config_folds(options, post_norm, tmp_path):
    cfg = Config.fromfile(CONFIG)
    cfg.model.enc = options
    save_untrained(cfg, tmp_path / "enc.pth")
    assert any("norm" in key for key in torch.load(tmp_path / "enc.pth", weights_only=True)) == post_norm
    assert fold_checkpoint(cfg, tmp_path / "enc.pth", tmp_path / "stock.pth").error < 1e-5


def test_layers_by_conv_cfg_and_timm_entries_fold_into_their_stock_config(tmp_path):
    cfg = Config.fromfile(STOCK)
    cfg.model.backbone.conv_cfg = dict(type="ENCConv2d", variant="wn", alpha=0.5)
    save_untrained(cfg, tmp_path / "enc.pth")
    assert fold_checkpoint(cfg, tmp_path / "enc.pth", tmp_path / "stock.pth").layers == 9
    assert stock_config(cfg).model.backbone.conv_cfg == dict(type="Conv2d")

    cfg = Config.fromfile(CONFIG.with_name("timm-resnet18_enc_1xb64.py"))
    save_untrained(cfg, tmp_path / "timm.pth")
    assert fold_checkpoint(cfg, tmp_path / "timm.pth", tmp_path / "stock.pth").layers == 22
    assert stock_config(cfg).model.model_name == "resnet18"


def test_a_post_norm_that_the_stock_model_has_no_bias_for_is_named(tmp_path):
    cfg = Config.fromfile(CONFIG)
    cfg.model.enc = dict(post_norm=True)
    save_untrained(cfg, tmp_path / "enc.pth")
    with pytest.raises(ValueError, match=r"\(post_norm=True\).*backbone.conv1.bias"):
        fold_checkpoint(cfg, tmp_path / "enc.pth", tmp_path / "stock.pth")
    assert not (tmp_path / "stock.pth").exists()


def test_given_images_replace_the_dataset(trained, tmp_path):
    cfg = Config.fromfile(CONFIG)
    cfg.test_dataloader = dict(
        dataset=dict(type="CIFAR10Folder", data_root="nowhere", pipeline=[dict(type="PackInputs")])
    )
    with pytest.raises(ValueError, match=r"dataset \(CIFAR10Folder\) cannot be read .*--images FILE"):
        fold_checkpoint(cfg, trained[0], tmp_path / "out.pth")
    images = []
    for i in range(3):
        images.append(str(tmp_path / f"{i}.png"))
        Image.effect_noise((8, 8), 60 + i).convert("RGB").save(images[-1])
    assert fold_checkpoint(cfg, trained[0], tmp_path / "out.pth", images=images).samples == 3
    assert fold_checkpoint(CONFIG, trained[0], tmp_path / "out.pth", images=[]).samples == 8
    with pytest.raises(FileNotFoundError, match="images: there is no file gone.png"):
        fold_checkpoint(cfg, trained[0], tmp_path / "out.pth", images=["gone.png"])


class Payload:
    """Pickles into a call of ``os.mkdir``."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def truncated(source, tmp_path):
    path = tmp_path / "bad.pth"
    path.write_bytes(source.read_bytes()[:-2000])
    return path


def flipped(source, tmp_path):
    data = bytearray(source.read_bytes())
    data[: len(data) // 8] = os.urandom(len(data) // 8)
    (tmp_path / "bad.pth").write_bytes(data)
    return tmp_path / "bad.pth"


def text(source, tmp_path):
    (tmp_path / "bad.pth").write_text("<html>404</html>")
    return tmp_path / "bad.pth"


def empty(source, tmp_path):
    (tmp_path / "bad.pth").touch()
    return tmp_path / "bad.pth"


def broken_safetensors(source, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    return tmp_path / "bad.safetensors"


def malicious(source, tmp_path):
    torch.save({"state_dict": {"x": torch.ones(1)}, "meta": Payload(tmp_path / "owned")}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def malicious_legacy(source, tmp_path):
    torch.save(Payload(tmp_path / "owned"), tmp_path / "bad.pth", _use_new_zipfile_serialization=False)
    return tmp_path / "bad.pth"


def no_state_dict(source, tmp_path):
    torch.save([torch.ones(2)], tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def numbered_tensors(source, tmp_path):
    torch.save({0: torch.ones(2)}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def not_tensors(source, tmp_path):
    torch.save({"meta": {"epoch": 3}, "optimizer": {}}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def missing_key(source, tmp_path):
    return rewrite(source, tmp_path / "bad.pth", lambda s: s.pop("backbone.layer1.0.conv1.weight"))


def surplus_key(source, tmp_path):
    return rewrite(source, tmp_path / "bad.pth", lambda s: s.update(surplus=torch.ones(1)))


def missing_norm(source, tmp_path):
    return rewrite(source, tmp_path / "bad.pth", lambda s: s.pop("head.fc.norm.running_var"))


def other_shape(source, tmp_path):
    return rewrite(source, tmp_path / "bad.pth", lambda s: s.update({"head.fc.weight": torch.ones(7, 64)}))


def not_finite(source, tmp_path):
    return rewrite(source, tmp_path / "bad.pth", lambda s: s["backbone.bn1.running_var"].fill_(float("nan")))


def no_direction(source, tmp_path):
    return rewrite(source, tmp_path / "bad.pth", lambda s: s["head.fc.weight"].fill_(0.5))


def plain_network(source, tmp_path):
    torch.save(get_model(str(STOCK), pretrained=False).state_dict(), tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def plain_network_without_metadata(source, tmp_path):
    save_file(get_model(str(STOCK), pretrained=False).state_dict(), tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


def other_variant(source, tmp_path):
    cfg = Config.fromfile(CONFIG)
    cfg.model.enc = dict(variant="wn")
    torch.save(get_model(cfg, pretrained=False).state_dict(), tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def gone(source, tmp_path):
    return tmp_path / "gone.pth"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated, "is damaged, or no checkpoint"),
        (flipped, "is damaged, or no checkpoint"),
        (text, "is damaged, or no checkpoint"),
        (empty, "is damaged, or no checkpoint"),
        (broken_safetensors, "is damaged, or no checkpoint"),
        (malicious, "holds more than tensors and plain values.*not loaded.*--unsafe-load"),
        (malicious_legacy, "holds more than tensors and plain values.*not loaded.*--unsafe-load"),
        (no_state_dict, "holds no state dict"),
        (numbered_tensors, "holds no state dict"),
        (not_tensors, "holds more than tensors: 'meta'"),
        (missing_key, "does not fit the config: .*Missing key.*backbone.layer1.0.conv1.weight"),
        (surplus_key, "does not fit the config: .*Unexpected key.*surplus"),
        (missing_norm, "does not fit the config: .*head.fc.norm.running_var"),
        (other_shape, "does not fit the config: .*size mismatch for head.fc.weight"),
        (not_finite, "NaN or Inf in 1 tensors: 'backbone.bn1.running_var'"),
        (no_direction, "layer 'head.fc': 10 of its 10 rows are constant"),
        (plain_network, "of a plain network, not of an ENC one"),
        (plain_network_without_metadata, "of a plain network, not of an ENC one"),
        (other_variant, r"layer 'backbone.conv1' was trained with variant='wn'.* has variant='ws'"),
        (gone, "there is no file"),
    ],
)
@pytest.mark.filterwarnings("ignore::enc_plugin.CheckpointWarning")
def test_a_bad_checkpoint_is_a_clear_error_and_no_file(make, message, trained, tmp_path):
    (tmp_path / "out").mkdir()
    bad = make(trained[0], tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fold_checkpoint(CONFIG, bad, tmp_path / "out" / "stock.pth")
    assert os.listdir(tmp_path / "out") == []
    assert not (tmp_path / "owned").exists()


def test_trust_loads_what_else_a_checkpoint_holds(trained, tmp_path):
    checkpoint = torch.load(trained[0], weights_only=True)
    torch.save({**checkpoint, "extra": Payload(tmp_path / "ran")}, tmp_path / "enc.pth")
    assert fold_checkpoint(CONFIG, tmp_path / "enc.pth", tmp_path / "stock.pth", trust=True).layers == 10
    assert (tmp_path / "ran").exists()


def test_outputs_that_differ_are_an_error_and_leave_an_older_file_alone(trained, tmp_path, monkeypatch):
    def wrong_fold(model):
        folded = enc_plugin_fold(model)
        with torch.no_grad():
            folded.head.fc.bias.add_(1e-3)
        return folded

    enc_plugin_fold = deploy.fold
    (tmp_path / "stock.pth").write_text("older")
    with monkeypatch.context() as patch:
        patch.setattr(deploy, "fold", wrong_fold)
        with pytest.raises(ValueError, match=r"outputs differ by .* the fold is wrong; nothing was written"):
            fold_checkpoint(CONFIG, trained[0], tmp_path / "stock.pth")
    assert (tmp_path / "stock.pth").read_text() == "older"
    fold_checkpoint(CONFIG, trained[0], tmp_path / "stock.pth")
    assert read_checkpoint(tmp_path / "stock.pth")[1]["meta"]["enc_fold"]["layers"] == 10


def test_a_difference_that_is_rounding_is_told_from_a_wrong_fold(trained, tmp_path):
    with pytest.raises(ValueError, match=r"in float64 they differ by \de-1\d, .* rounding; use a larger tolerance"):
        fold_checkpoint(CONFIG, trained[0], tmp_path / "stock.pth", tolerance=0)
    assert not (tmp_path / "stock.pth").exists()


def test_outputs_are_compared_in_full_precision_whatever_is_set_around_the_call(trained, tmp_path):
    with torch.autocast("cpu"):
        assert fold_checkpoint(CONFIG, trained[0], tmp_path / "stock.pth").error < 1e-5


def test_a_write_that_breaks_off_leaves_no_file(trained, tmp_path, monkeypatch):
    def half(content, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        fold_checkpoint(CONFIG, trained[0], tmp_path / "stock.pth")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("config", "out", "safetensors", "message"),
    [
        (CONFIG, "out.pth", True, "safetensors with --safetensors, and only then"),
        (CONFIG, "out.safetensors", False, "safetensors with --safetensors, and only then"),
        (CONFIG, "epoch_1.pth", False, "the checkpoint itself"),
        (CONFIG, "", False, "a folder"),
        (STOCK, "out.pth", False, "no ENC layers, so there is nothing to fold"),
        ("gone.py", "out.pth", False, "config: there is no file gone.py"),
    ],
)
def test_bad_arguments_are_named(config, out, safetensors, message, trained):
    folder = trained[0].parent
    before = sorted(os.listdir(folder))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fold_checkpoint(config, trained[0], folder / out, safetensors=safetensors)
    assert sorted(os.listdir(folder)) == before


def test_the_command_line_folds_and_says_how_well(trained, tmp_path, monkeypatch, capsys):
    run_tool("fold", [CONFIG, trained[0], tmp_path / "stock.pth", "--num-samples", 4], monkeypatch)
    assert "folded 10 ENC layers (ws, alpha 1.0); outputs differ by" in capsys.readouterr().out
    other = [CONFIG, trained[0], tmp_path / "b.pth", "--cfg-options", "model.enc.variant=wn"]
    with pytest.raises(SystemExit, match="^fold: checkpoint: its layer 'backbone.conv1' was trained with variant='ws'"):
        run_tool("fold", other, monkeypatch)
    assert os.listdir(tmp_path) == ["stock.pth"]


def test_the_stock_config_of_a_penalised_classifier_is_the_stock_classifier():
    for kind in ("ENCImageClassifier", "GBRImageClassifier"):
        cfg = Config.fromfile(CONFIGS / "digits" / "resnet8_enc-ws_1xb64.py")
        cfg.model.update(type=kind, gbr_penalty=dict(weight=1e-3))
        stock = stock_config(cfg).model
        assert stock.type == "ImageClassifier"
        assert "gbr_penalty" not in stock
