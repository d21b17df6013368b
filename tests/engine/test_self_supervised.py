"""Self-supervised models of mmpretrain with ENC backbones: two views of a picture, and an average of the encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import build_runner, digits_config, train
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from enc_plugin import audit
from enc_plugin.doctor.config import check_config
from enc_plugin.doctor.finding import BROKEN

MOMENTUM = 0.1


@HOOKS.register_module()
class _KeepWeights(Hook):
    """Keeps the backbone's weights from before each step."""

    def before_train(self, runner):
        self.kept = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.kept.append({name: p.detach().clone() for name, p in runner.model.backbone.named_parameters()})


def moco(work_dir: Path, collate: str = "default_collate", hooks: tuple[dict, ...] = ()) -> Config:
    cfg = digits_config(work_dir, "resnet8_1xb64", custom_hooks=list(hooks))
    backbone = cfg.model.backbone | dict(conv_cfg=dict(type="ENCConv2d"))
    neck = dict(type="NonLinearNeck", in_channels=64, hid_channels=16, out_channels=8, with_last_bn=False)
    head = dict(type="ContrastiveHead", loss=dict(type="CrossEntropyLoss"), temperature=0.1)
    cfg.model = dict(type="MoCo", queue_len=128, feat_dim=8, momentum=MOMENTUM, backbone=backbone, neck=neck, head=head)
    cfg.data_preprocessor = dict(type="SelfSupDataPreprocessor", mean=[77.9] * 3, std=[95.9] * 3, to_rgb=False)
    crop = dict(type="RandomCrop", crop_size=8, padding=1)
    views = dict(type="MultiView", num_views=2, transforms=[[crop]])
    cfg.train_dataloader.dataset.pipeline = [views, dict(type="PackInputs")]
    cfg.train_dataloader.collate_fn = dict(type=collate)
    for key in ("dataloader", "cfg", "evaluator"):
        cfg[f"val_{key}"] = cfg[f"test_{key}"] = None
    return cfg


def test_the_momentum_encoder_averages_the_free_weights_of_the_other(tmp_path):
    runner = train(moco(tmp_path, hooks=(dict(type="_KeepWeights"),)))
    assert len(audit(runner.model)) == 2 * 9
    assert audit(runner.model).max_deviation < 1e-5
    first, *others = next(hook for hook in runner.hooks if isinstance(hook, _KeepWeights)).kept
    for name, average in runner.model.encoder_k.module[0].named_parameters():
        expected = first[name].double()
        for weights in others:
            expected = (1 - MOMENTUM) * expected + MOMENTUM * weights[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_doctor_takes_two_views(tmp_path):
    moco(tmp_path).dump(tmp_path / "moco.py")
    findings = list(check_config(str(tmp_path / "moco.py")))
    assert [finding for finding in findings if finding.state == BROKEN] == []
    assert "two samples of (3, 8, 8) and (3, 8, 8)" in {f.name: f.found for f in findings}["forward"]


def test_views_that_are_not_stacked_are_told_in_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"first training step fails .* set dict\(type='default_collate'\)"):
        train(moco(tmp_path, collate="pseudo_collate"))


def test_a_measurement_of_single_pictures_is_refused_before_training(tmp_path):
    hook = dict(type="GBRHook", num_samples=8, pipeline=[dict(type="PackInputs")])
    runner = build_runner(moco(tmp_path, hooks=(hook,)))
    with pytest.raises(ValueError, match="expected a classifier of single images, but the SelfSupDataPreprocessor"):
        runner.train()
    assert runner.iter == 0
