"""What a run refuses before its first step, the doctor finds, in the same words; and the other way round."""

from __future__ import annotations

import pytest
import torch
from helpers import CONFIGS, build_runner, digits_config
from mmengine.config import Config
from mmpretrain import get_model

from enc_plugin.doctor import BROKEN
from enc_plugin.doctor.config import check_config
from enc_plugin.engine.preflight import find_labels
from enc_plugin.engine.rehearsal import rehearse
from enc_plugin.refused import Refused, describe

DIGITS = CONFIGS / "digits" / "resnet8_enc-ws_1xb64.py"

REFUSED = {
    "labels beyond the head": (
        "model = dict(head=dict(num_classes=7))",
        "train_dataloader: expected labels from 0 to 6, because the head has num_classes=7, got 7 (sample 7",
    ),
    "more of the top than there are classes": ("val_evaluator = dict(topk=(1, 11))", "the top 11 of 10 classes"),
    "data that is not there": (
        'val_dataloader = dict(dataset=dict(_delete_=True, type="CustomDataset", data_root="/not/there"))',
        "val_dataloader.dataset.data_root = '/not/there' does not exist",
    ),
    "a sample that cannot be read": (
        'val_dataloader = dict(dataset=dict(pipeline=[dict(type="LoadImageFromFile"), dict(type="PackInputs")]))',
        "KeyError: img_path",
    ),
    "a head that does not fit": ("model = dict(head=dict(in_channels=32))", "set model.head.in_channels=64"),
    "no ENC layer": ('model = dict(enc=dict(exclude=["backbone", "head"]))', "no layer of the network is ENC"),
    "a batch of one": (
        "train_dataloader = dict(dataset=dict(indices=65))",
        "65 samples in batches of 64 leave a batch of one",
    ),
    "an interval of 0": ('custom_hooks = [dict(type="GBRHook", interval=0)]', "interval: expected at least 1, got 0"),
    "a schedule after a warmup as long as the run": (
        'train_cfg = dict(max_epochs=5)\nparam_scheduler = [dict(type="CosineAnnealingLR", begin=5)]',
        "param_scheduler: CosineAnnealingLR begins after 5 epochs, but training ends after 5",
    ),
    "a schedule after a warmup by iterations that is longer than the run": (
        'param_scheduler = [dict(type="PolyLR", begin=5000, by_epoch=False)]',
        "param_scheduler: PolyLR begins after 5000 iters, but training ends after",
    ),
    "a schedule of decay that reaches biases": (
        'param_scheduler = [dict(type="PolyParamScheduler", param_name="weight_decay", eta_min=1e-3)]',
        "PolyParamScheduler takes the weight decay of all parameters to eta_min=0.001, also of 11 tensors that do not",
    ),
    "batch norms merged into free weights": (
        'efficient_conv_bn_eval = ["backbone"]',
        "efficient_conv_bn_eval: 'backbone' has layers such as ENCConv2d, but the option computes with",
    ),
    "a strategy": ('strategy = dict(type="DDPStrategy")', "strategy: 'DDPStrategy' is for mmengine's FlexibleRunner"),
}


@pytest.mark.filterwarnings("ignore::enc_plugin.NoEffectWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_refuses_the_doctor_finds_in_the_same_words(case, tmp_path):
    line, message = REFUSED[case]
    config = tmp_path / "bad.py"
    config.write_text(f"_base_ = {str(DIGITS)!r}\n{line}\n")
    broken = [f"{f.found}; {f.advice}" for f in check_config(str(config)) if f.state == BROKEN]
    assert any(message in text for text in broken), broken

    cfg = Config.fromfile(config)
    cfg.work_dir, cfg.launcher = str(tmp_path / "run"), "none"
    steps = []

    def run() -> None:
        runner = build_runner(cfg)
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.optim_wrapper.optimizer.register_step_pre_hook(lambda *_: steps.append(1))
        runner.train()

    with pytest.raises((ValueError, TypeError)) as refused:
        run()
    assert message in str(refused.value)
    assert not steps


def test_a_config_that_works_is_rehearsed_without_a_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = digits_config(tmp_path / "run", custom_hooks=[dict(type="FGSMHook", eps=4)])
    before = cfg.pretty_text
    rehearse(cfg)
    assert cfg.pretty_text == before
    assert not list(tmp_path.iterdir())
    cfg.pop("runner_type")
    rehearse(cfg)
    cfg.val_evaluator.topk = (1, 11)
    with pytest.raises(Refused, match="top 11 of 10"):  # under mmengine's own runner too
        rehearse(cfg)


def test_more_classes_than_labels_are_odd_and_no_error(tmp_path):
    cfg = digits_config(tmp_path)

    class Data(torch.utils.data.Dataset):
        metainfo = {"classes": list("abcde")}

        def __len__(self):
            return 4

        def get_data_info(self, index):
            return {"gt_label": index % 2}

    assert find_labels("train_dataloader", Data(), 5) == []
    (note,) = find_labels("train_dataloader", Data(), 3)
    assert "5 classes in the data, model.head.num_classes = 3" in note
    assert get_model(cfg, pretrained=False).head.num_classes == 10


def test_a_step_that_fails_later_keeps_its_error(tmp_path):
    runner = build_runner(digits_config(tmp_path))
    forward = type(runner.model).forward

    def fail_later(self, *args, **kwargs):
        if kwargs.get("mode") == "loss" and runner.iter == 1:
            raise RuntimeError("lost")
        return forward(self, *args, **kwargs)

    runner.model.forward = fail_later.__get__(runner.model)
    with pytest.raises(RuntimeError, match="^lost$") as failed:
        runner.train()
    assert describe(failed.value) == "RuntimeError: lost"


def test_validation_alone_needs_no_best_checkpoint(tmp_path):
    """mmengine's hook fails behind a validation without training, where save_best is set (its issue 1587)."""
    cfg = digits_config(tmp_path, default_hooks__checkpoint=dict(type="CheckpointHook", save_best="auto"))
    assert "accuracy/top1" in build_runner(cfg).val()
    assert not list(tmp_path.glob("best_*"))
