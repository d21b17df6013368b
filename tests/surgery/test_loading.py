"""Checkpoints across settings: plain and ENC, other variants and alphas, learnable alpha, EMA, assign=True."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from functional.test_weights import literal
from helpers import digits_config, train
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner.checkpoint import get_state_dict, load_state_dict, weights_to_cpu
from mmpretrain.models import AverageClsScoreTTA, VisionTransformer
from safetensors.torch import load, save
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from enc_plugin import CheckpointWarning, ENCConv2d, ENCLinear, fold, to_enc
from enc_plugin.build import build_model
from enc_plugin.layers.origin import saved_settings
from enc_plugin.surgery.loading import Loading, check_trained_as, load_trained


def net(**options) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 9, 5)).eval()
    if options:
        to_enc(model, **options)
    return model


SETTINGS = {
    "0": {"variant": "wn", "alpha": 2.0, "post_norm": False},
    "3": {"variant": "wn", "alpha": 2.0, "post_norm": True},
}


def roundtrip(state_dict, path):
    torch.save({"state_dict": state_dict}, path)
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(autouse=True)
def _unexpected_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        yield


@pytest.mark.parametrize("save", [nn.Module.state_dict, lambda m: weights_to_cpu(get_state_dict(m))])
def test_settings_travel_with_the_state_dict_under_one_key_a_layer(save, tmp_path):
    model = net(variant="wn", alpha=2.0)
    saved = roundtrip(save(model), tmp_path / "x.pth")
    assert saved_settings(saved) == SETTINGS
    norm = {f"3.norm.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert set(saved) - set(net().state_dict()) == norm | {"0._extra_state", "3._extra_state"}
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


def averaged(kind: str) -> Callable[[nn.Module], dict]:
    """The state dict of an average, its buffers included, that three steps have updated."""

    def average(model: nn.Module) -> dict:
        make = {
            "mmengine": lambda: ExponentialMovingAverage(model, momentum=0.3, update_buffers=True),
            "torch": lambda: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
            "timm v2": lambda: ModelEmaV2(model, decay=0.3),
            "timm v3": lambda: ModelEmaV3(model, decay=0.3, foreach=False),
        }
        copy_ = make[kind]()
        for _ in range(3):
            (copy_.update_parameters if hasattr(copy_, "update_parameters") else copy_.update)(model)
        return dict(copy_.module.state_dict())

    return average


def through_safetensors(model: nn.Module) -> dict:
    return load(save({key: value.clone() for key, value in model.state_dict().items()}))


def soup(model: nn.Module) -> dict:
    """The mean of three checkpoints, in the dtype of each entry."""
    state = model.state_dict()
    return {key: ((value + value + value) / 3).to(value.dtype) for key, value in state.items()}


ROUND_TRIPS: dict[str, Callable[[nn.Module], dict]] = {
    "plain dict": lambda model: dict(model.state_dict()),
    "safetensors": through_safetensors,
    "prefix of a wrapper": lambda model: nn.DataParallel(model).state_dict(),
    "prefix taken off": lambda model: {k[2:]: v for k, v in nn.Sequential(model).state_dict().items()},
    "bfloat16": lambda model: {key: value.bfloat16() for key, value in model.state_dict().items()},
    "sum of checkpoints": soup,
    "distributed checkpoint": lambda model: dict(get_model_state_dict(model)),
    "whole model": lambda model: pickle.loads(pickle.dumps(model)).state_dict(),
    "compiled": lambda model: {k.removeprefix("_orig_mod."): v for k, v in torch.compile(model).state_dict().items()},
    **{f"average of {kind}": averaged(kind) for kind in ("mmengine", "torch", "timm v2", "timm v3")},
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_settings_outlive_torchs_metadata(name):
    model = net(variant="wn", alpha=2.0)
    saved = dict(ROUND_TRIPS[name](model))
    assert saved_settings(saved) == SETTINGS
    saved = {key.removeprefix("module."): value for key, value in saved.items()}
    net(variant="wn", alpha=2.0).load_state_dict(saved, strict=True)  # in silence
    with pytest.warns(CheckpointWarning, match="with variant='wn', this one has variant='fro'"):
        net(variant="fro", alpha=2.0).load_state_dict(saved, strict=True)


def test_a_stock_network_refuses_the_keys_of_enc_layers_and_a_folded_one_has_none():
    source = net(variant="wn", exclude="3")
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0._extra_state"'):
        net().load_state_dict(dict(source.state_dict()), strict=True)
    net().load_state_dict(fold(source).state_dict(), strict=True)


def test_settings_are_right_after_meta_and_to_empty():
    with torch.device("meta"):
        model = net(variant="wn", alpha=2.0)
        assert saved_settings(model.state_dict()) == SETTINGS
    model.to_empty(device="cpu").load_state_dict(net(variant="wn", alpha=2.0).state_dict(), strict=True)
    assert saved_settings(model.state_dict()) == SETTINGS


def test_functional_calls_take_a_whole_state_dict():
    model, x = net(variant="wn"), torch.randn(2, 3, 5, 5)
    assert torch.equal(torch.func.functional_call(model, dict(model.state_dict()), x), model(x))
    assert not hasattr(model[0], "_extra_state")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "variant='unknown'"),
        (torch.zeros(3, dtype=torch.int32), "variant='unknown'"),
        (torch.tensor(list(b'{"variant": "wn", "future": 1}')), "with future=1, this one has future=None"),
    ],
    ids=["taken out", "overwritten", "of a newer version"],
)
def test_an_entry_that_cannot_be_read_never_makes_a_layer_plain(entry, message):
    state, model = dict(net(variant="wn").state_dict()), net(variant="wn")
    state.pop("3._extra_state") if entry is None else state.update({"3._extra_state": entry})
    with pytest.warns(CheckpointWarning, match=message):
        model.load_state_dict(state, strict=True)
    assert model[3].loaded_settings


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


def test_what_the_models_own_hooks_load_counts_as_loaded():
    arch = dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=32)
    source, model = (VisionTransformer(arch, img_size=size, patch_size=16) for size in (32, 64))
    assert source.pos_embed.shape != model.pos_embed.shape
    loading = Loading(model)
    load_state_dict(model, source.state_dict())  # mmpretrain interpolates the position embedding
    assert loading.left == []
    assert loading.loaded.keys() == dict(model.named_parameters()).keys()


def test_a_wrapper_for_test_time_augmentation_is_looked_through(tmp_path):
    cfg = digits_config(tmp_path)
    inner, tta = build_model(cfg), AverageClsScoreTTA(module=build_model(cfg))
    loading = Loading(tta)
    load_state_dict(tta, inner.state_dict())
    assert (loading.left, loading.broken) == ([], [])
    check_trained_as(tta)


def test_what_stays_and_what_is_broken_is_observed():
    class Masked(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 2), nn.BatchNorm1d(2))
            self.register_buffer("mask", torch.full((2,), -math.inf))

    state, model = Masked().state_dict(), Masked()
    state["0.weight"][0, 0] = math.nan
    del state["0.bias"], state["1.num_batches_tracked"]
    loading = Loading(model)
    model.load_state_dict(state, strict=False)
    assert loading.left == ["0.bias"]
    assert loading.broken == ["0.weight"]


def test_networks_are_measured_only_as_they_were_trained():
    warnings.simplefilter("ignore", CheckpointWarning)  # until the end of the test: the fixture restores
    with pytest.raises(ValueError, match="layer '0' is plain, but the layer of this model is ENC"):
        load_trained(net(variant="ws"), dict(net().state_dict()))
    with pytest.raises(ValueError, match="layer '0' was trained with variant='wn'.* has variant='ws'"):
        load_trained(net(variant="ws"), dict(net(variant="wn").state_dict()))
    with pytest.raises(ValueError, match="2 of its layers are ENC but plain in this model"):
        load_trained(net(), dict(net(variant="wn").state_dict()))
    load_trained(net(variant="wn", alpha="learnable"), dict(net(variant="wn", alpha=2.0).state_dict()))


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


@pytest.mark.parametrize("runner", ["ENCRunner", "Runner"])
@pytest.mark.parametrize("way", ["load_from", "init_cfg"])
def test_a_plain_run_refuses_an_enc_checkpoint_and_names_the_tool(way, runner, runs, tmp_path):
    cfg = digits_config(tmp_path, "resnet8_1xb64", runner_type=runner)
    if way == "load_from":
        cfg.load_from = str(runs[1])
    else:
        cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(runs[1]), prefix="backbone.")
    count = 10 if way == "load_from" else 9
    with pytest.raises(ValueError, match=rf"{count} of its layers are ENC but plain in this model .*tools/fold\.py"):
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
