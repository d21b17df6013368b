"""Checkpoints across settings: plain and ENC, other variants and alphas, learnable alpha, EMA, assign=True."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from functional.test_weights import literal
from helpers import digits_config, train
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner.checkpoint import get_state_dict, weights_to_cpu
from torch import nn

from enc_plugin import CheckpointWarning, ENCConv2d, ENCLinear, fold, to_enc
from enc_plugin.layers import saved_settings


def net(**options) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 9, 5)).eval()
    if options:
        to_enc(model, **options)
    return model


def roundtrip(state_dict, path):
    torch.save({"state_dict": state_dict}, path)
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(autouse=True)
def _unexpected_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        yield


@pytest.mark.parametrize("save", [nn.Module.state_dict, lambda m: weights_to_cpu(get_state_dict(m))])
def test_settings_travel_with_the_state_dict_and_add_no_key(save, tmp_path):
    model = net(variant="wn", alpha=2.0)
    saved = roundtrip(save(model), tmp_path / "x.pth")
    assert saved_settings(saved) == {
        "0": {"variant": "wn", "alpha": 2.0, "post_norm": False},
        "3": {"variant": "wn", "alpha": 2.0, "post_norm": True},
    }
    assert set(saved) - set(net().state_dict()) == {
        f"3.norm.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    other = net(variant="wn", alpha=2.0)
    other.load_state_dict(saved)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (dict(variant="wn"), dict(variant="ws"), r"with variant='wn', this one has variant='ws'"),
        (dict(alpha=2.0), dict(alpha=1.0), r"with alpha=2.0, this one has alpha=1.0"),
        (
            dict(variant="fro", alpha=0.5),
            dict(),
            r"with variant='fro', alpha=0.5, this one has variant='ws', alpha=1.0",
        ),
        (dict(post_norm=False), dict(), r"with post_norm=False, this one has post_norm=True"),
    ],
)
def test_another_variant_or_alpha_warns_and_loads_the_free_weights(saved, loaded, message):
    source, model = net(**{"variant": "ws", **saved}), net(**{"variant": "ws", **loaded})
    with pytest.warns(CheckpointWarning, match=message):
        model.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(model[0].weight, source[0].weight)


def test_a_plain_checkpoint_in_an_enc_network_warns_once_per_text():
    model = net(variant="ws")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model.load_state_dict(net().state_dict(), strict=True)
    assert len({str(w.message) for w in caught}) == 1
    assert "of a plain network" in str(caught[0].message)


def test_a_state_dict_without_metadata_loads_in_silence():
    source, model = net(variant="ws"), net(variant="ws")
    model.load_state_dict(dict(source.state_dict()), strict=True)
    assert saved_settings(dict(source.state_dict())) is None


def test_a_number_for_alpha_becomes_the_start_of_a_learnable_one():
    source, model = net(alpha=2.0), net(alpha="learnable")
    model.load_state_dict(source.state_dict(), strict=True)
    assert model[0].log_alpha.item() == pytest.approx(math.log(2))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model(x), source(x))


def test_a_learnable_alpha_in_a_network_with_a_number_is_an_error_or_warns():
    source, model = net(alpha="learnable"), net(alpha=1.0)
    warning = pytest.warns(CheckpointWarning, match="alpha='learnable', this one has alpha=1.0")
    with warning, pytest.raises(RuntimeError, match="Unexpected key.*log_alpha"):
        model.load_state_dict(source.state_dict(), strict=True)


def test_an_enc_checkpoint_in_a_plain_network_is_a_strict_error():
    with pytest.raises(RuntimeError, match="Unexpected key.*3.norm.weight"):
        net().load_state_dict(net(variant="ws").state_dict(), strict=True)


def test_assign_takes_the_tensors_themselves():
    source = net(variant="ws", alpha="learnable")
    with torch.device("meta"):
        model = net(variant="ws", alpha="learnable")
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(model(x), source(x))
    assert model[0].weight.data_ptr() == source[0].weight.data_ptr()
    with torch.device("meta"):
        plain_start = ENCLinear(4, 3, post_norm=True)
    with pytest.warns(CheckpointWarning):
        plain_start.load_state_dict(nn.Linear(4, 3).state_dict(), assign=True)
    assert plain_start.weight.device.type == "cpu"


def test_the_mean_of_enc_weights_is_the_free_weights_mean():
    # What EMA of any kind averages are the parameters; the layer normalises the average, once.
    layers = [ENCConv2d(3, 8, 3), ENCConv2d(3, 8, 3)]
    average = torch.optim.swa_utils.AveragedModel(layers[0])
    for layer in layers:
        average.update_parameters(layer)
    mean = (layers[0].weight + layers[1].weight) / 2
    torch.testing.assert_close(average.module.effective_weight, literal(mean.detach(), "ws", 1.0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A plain and an ENC run of one epoch, the latter with EMA weights."""
    folder = tmp_path_factory.mktemp("runs")
    train(digits_config(folder / "plain", "resnet8_1xb64"))
    enc = train(digits_config(folder / "enc", custom_hooks=[dict(type="EMAHook", momentum=0.5)]))
    return folder / "plain" / "epoch_1.pth", folder / "enc" / "epoch_1.pth", enc


def test_ema_checkpoints_hold_the_averaged_network_and_its_settings(runs):
    _, path, runner = runs
    checkpoint = torch.load(path, weights_only=True)
    ema = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook").ema_model.module
    weight = "backbone.conv1.weight"
    assert torch.equal(checkpoint["state_dict"][weight], ema.state_dict()[weight])
    assert not torch.equal(checkpoint["state_dict"][weight], runner.model.state_dict()[weight])
    assert saved_settings(checkpoint["state_dict"])["backbone.conv1"]["variant"] == "ws"

    model = copy.deepcopy(runner.model)
    load_checkpoint(model, str(path), strict=True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), ema.eval()(x))
    torch.testing.assert_close(fold(model)(x), ema(x))


def test_an_enc_run_resumes_in_silence(runs, tmp_path):
    _, path, _ = runs
    cfg = digits_config(tmp_path, epochs=2, resume=True, load_from=str(path))
    cfg.custom_hooks = [dict(type="EMAHook", momentum=0.5)]
    assert train(cfg).epoch == 2


def test_a_plain_run_refuses_an_enc_checkpoint_and_names_the_tool(runs, tmp_path):
    cfg = digits_config(tmp_path, "resnet8_1xb64", load_from=str(runs[1]))
    with pytest.raises(ValueError, match=r"10 of its layers are ENC where this model's are plain .*tools/fold\.py"):
        train(cfg)


def test_an_enc_run_starts_from_a_plain_checkpoint_with_a_warning_or_with_its_function(runs, tmp_path):
    with pytest.warns(CheckpointWarning, match="of a plain network"):
        train(digits_config(tmp_path / "a", load_from=str(runs[0])))
    cfg = digits_config(tmp_path / "b", load_from=str(runs[0]))
    cfg.model.enc = dict(variant="wn", preserve=True)
    cfg.optim_wrapper.optimizer.lr = 0.0
    runner = train(cfg)
    plain = CheckpointLoader.load_checkpoint(str(runs[0]))["state_dict"]
    assert torch.equal(runner.model.state_dict()["backbone.conv1.weight"], plain["backbone.conv1.weight"])
    assert runner.model.enc_report.preserved.output_change < 1e-3
