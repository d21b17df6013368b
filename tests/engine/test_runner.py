"""Real short runs: how ENC enters a config, alone and distributed, with mixed precision."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, build_runner, digits_config, dist_train, scalars, train
from mmengine.config import Config
from mmengine.runner import load_checkpoint

from enc_plugin import audit
from enc_plugin.convert import enc_layers
from enc_plugin.engine import amp
from enc_plugin.engine.gloo import ddp_on_cpu

ENC_CONFIG = CONFIGS / "digits" / "resnet8_enc-ws_1xb64.py"
CONV_CFG = dict(type="ENCConv2d", variant="ws", alpha=1.0)


def log_text(work_dir) -> str:
    return next(work_dir.glob("*/*.log")).read_text()


def weights(runner) -> dict[str, torch.Tensor]:
    model = runner.model
    return {key: value.clone() for key, value in getattr(model, "module", model).state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_conv_cfg_and_classifier_train_to_identical_weights(tmp_path):
    """The backbone by conv_cfg, by the classifier, or by both: the same network."""
    by_conv_cfg = digits_config(tmp_path / "a", "resnet8_1xb64", model__backbone__conv_cfg=CONV_CFG)
    by_classifier = digits_config(tmp_path / "b", model__enc=dict(include="backbone", variant="ws", alpha=1.0))
    twice = digits_config(tmp_path / "c", model__enc=dict(include="backbone"), model__backbone__conv_cfg=CONV_CFG)
    runs = [train(cfg) for cfg in (by_conv_cfg, by_classifier, twice)]
    assert len(list(enc_layers(runs[0].model))) == 9
    assert_equal(weights(runs[0]), weights(runs[1]))
    assert_equal(weights(runs[0]), weights(runs[2]))


def test_the_classifier_completes_a_backbone_built_by_conv_cfg(tmp_path):
    one = train(digits_config(tmp_path / "a"))
    both = train(digits_config(tmp_path / "b", model__backbone__conv_cfg=CONV_CFG))
    assert len(list(enc_layers(both.model))) == 10
    assert_equal(weights(one), weights(both))


def test_statistics_fit_from_the_first_step_in_enc_networks_alone(tmp_path):
    """ENC by conv_cfg, too; a plain network stays mmengine's, bit for bit; weights do not depend on it."""
    by_conv_cfg = train(digits_config(tmp_path / "a", "resnet8_1xb64", model__backbone__conv_cfg=CONV_CFG))
    stock_rule = digits_config(
        tmp_path / "b", "resnet8_1xb64", model__backbone__conv_cfg=CONV_CFG, runner_type="Runner"
    )
    states = [weights(by_conv_cfg), weights(train(stock_rule))]
    parameters = {name for name, _ in by_conv_cfg.model.named_parameters()}
    assert_equal(*({key: state[key] for key in parameters} for state in states))
    fitting, stale = (state["backbone.bn1.running_var"] for state in states)
    assert stale.min() > 0.9**3  # three batches, and layers of small outputs
    assert fitting.max() < 0.1

    plain = digits_config(tmp_path / "c", "resnet8_1xb64")
    stock = digits_config(tmp_path / "d", "resnet8_1xb64", runner_type="Runner")
    assert_equal(weights(train(plain)), weights(train(stock)))


def test_a_number_measured_before_statistics_fit_says_so(tmp_path):
    hooks = [dict(type="GBRHook", num_samples=4, projections=1)]
    train(digits_config(tmp_path / "enc", custom_hooks=hooks))
    notes = [line for line in log_text(tmp_path / "enc").splitlines() if "not yet the network that is trained" in line]
    assert len(notes) == 1
    assert "at epoch 0" in notes[0]
    assert "10 batch norms do not fit ('backbone.bn1': no batch seen)" in notes[0]
    train(digits_config(tmp_path / "plain", "resnet8_1xb64"))
    assert "ENC: the validated network is not yet the network that is trained" in log_text(tmp_path / "plain")


def test_the_log_states_layers_decay_and_constraint_at_start_and_end(tmp_path):
    runner = train(digits_config(tmp_path))
    text = log_text(tmp_path)
    assert "ENC optimizer: 10 tensors (77,360 elements) shifted decay, 10 tensors" in text
    lines = re.findall(
        r"ENC: 10 layers \(ws, alpha 1\), 1 with an added batch norm; .* within (\S+) \(relative\)\n", text
    )
    assert len(lines) == 2
    assert all(float(value) < 1e-5 for value in lines)
    assert audit(runner.model).max_deviation < 1e-5


def test_a_plain_model_is_reported_as_such(tmp_path):
    train(digits_config(tmp_path, "resnet8_1xb64"))
    assert log_text(tmp_path).count("ENC: this model has no ENC layers") == 2


def test_stock_initialisation_reaches_enc_layers(tmp_path):
    """mmengine initialises by class name or direct base: the free weights are those of the plain network."""
    states = []
    for name in ("resnet8_1xb64", "resnet8_enc-ws_1xb64"):
        runner = build_runner(digits_config(tmp_path / name, name))
        runner._init_model_weights()
        states.append(weights(runner))
    reference, own = states
    assert all(torch.equal(own[key], value) for key, value in reference.items())


def test_weights_that_cannot_be_normalised_stop_before_the_first_step(tmp_path):
    cfg = digits_config(tmp_path, model__head__init_cfg=dict(type="Constant", layer="Linear", val=0.0))
    with pytest.raises(ValueError, match="layer 'head.fc': 10 of its 10 rows are all zero"):
        train(cfg)


def test_a_loaded_checkpoint_that_cannot_be_normalised_stops_before_the_first_step(tmp_path):
    runner = build_runner(digits_config(tmp_path / "a"))
    state = runner.model.state_dict()
    state["backbone.conv1.weight"][3] = 0.25
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="layer 'backbone.conv1': 1 of its 16 rows are constant"):
        train(digits_config(tmp_path / "b", load_from=str(tmp_path / "broken.pth")))


def test_a_checkpoint_of_which_nothing_fits_stops_before_the_first_step(tmp_path):
    torch.save({"state_dict": {"net.conv.weight": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match="its keys are 'net.conv.weight', ..., the model's are 'backbone.conv1.weight'"
    ):
        train(digits_config(tmp_path / "run", load_from=str(tmp_path / "other.pth")))


def test_the_cpu_is_asked_for_bfloat16_instructions_as_torch_asks_it():
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if asked is None or platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file():
        pytest.skip("torch asks x86 alone, and Linux tells")
    assert amp.has_bfloat16_instructions() == asked()


def test_mixed_precision_without_cuda_is_bfloat16_and_keeps_the_constraint(tmp_path, monkeypatch):
    monkeypatch.setattr(amp, "has_bfloat16_instructions", lambda: False)
    runner = train(digits_config(tmp_path, optim_wrapper__type="AmpOptimWrapper", optim_wrapper__loss_scale="dynamic"))
    assert type(runner.optim_wrapper).__name__ == "BFloat16OptimWrapper"
    assert audit(runner.model).max_deviation < 1e-5
    assert all(p.dtype == torch.float32 for p in runner.model.parameters())
    assert "bfloat16 is emulated, 7 to 30 times slower than float32" in log_text(tmp_path)
    assert all(line["loss"] > 0 for line in scalars(tmp_path) if "loss" in line)


def test_checkpoints_that_ask_for_other_code_stay_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (getattr, (torch.nn.Module, "forward"))

    torch.save({"state_dict": {}, "meta": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="no mmengine checkpoint needs|Unsupported"):
        load_checkpoint(torch.nn.Linear(1, 1), str(tmp_path / "evil.pth"))


def test_two_gloo_processes_train(tmp_path):
    options = ["--cfg-options", "train_dataloader.dataset.indices=128", "val_dataloader.dataset.indices=63"]
    options += ["train_cfg.max_epochs=2", "train_dataloader.batch_size=16"]
    options += ["optim_wrapper.accumulative_counts=2", "model_wrapper_cfg.find_unused_parameters=True"]
    done = dist_train(ENC_CONFIG, 2, "--work-dir", str(tmp_path), *options)
    text = done.stdout + done.stderr
    assert "ENC: without CUDA, the distributed backend is gloo" in text
    checkpoint = torch.load(tmp_path / "epoch_2.pth")
    assert "accuracy/top1" in text
    assert len(checkpoint["optimizer"]["param_groups"]) == 3


def test_a_model_wrapper_of_the_config_loses_its_device_ids_alone_without_cuda():
    default = dict(type="MMDistributedDataParallel", device_ids=None)
    assert ddp_on_cpu(None, True) == default | dict(broadcast_buffers=False, find_unused_parameters=True)
    assert ddp_on_cpu(dict(static_graph=True, device_ids=[0]), False) == default | dict(static_graph=True)
    separate = dict(type="MMSeparateDistributedDataParallel")
    assert ddp_on_cpu(separate, False) == separate | dict(device_ids=None)
    other = dict(type="MMFullyShardedDataParallel", use_orig_params=True)
    assert ddp_on_cpu(other, False) == other


def test_a_config_of_enc_names_its_plugin():
    cfg = Config.fromfile(ENC_CONFIG)
    assert cfg.custom_imports["imports"] == ["enc_plugin"]
    assert cfg.runner_type == "ENCRunner"
