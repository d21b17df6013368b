"""ENCAuditHook looks at the first batch: who reads the weights of ENC layers, and which of them run."""

from __future__ import annotations

import pytest
from helpers import build_runner, digits_config
from mmengine.registry import MODELS
from torch import nn

from enc_plugin.models.backbones import ResNetCIFAR6n


@MODELS.register_module()
class StemInAHelper(ResNetCIFAR6n):
    """Computes its stem by hand."""

    def stem_by_hand(self, x):
        return nn.functional.conv2d(x, self.conv1.weight, padding=1)

    def forward(self, x):
        before = self.conv1.forward
        self.conv1.forward = self.stem_by_hand
        try:
            return super().forward(x)
        finally:
            self.conv1.forward = before


@MODELS.register_module()
class IdleLayer(ResNetCIFAR6n):
    """Owns a layer that it does not use."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.idle = MODELS.build(dict(type="ENCConv2d", in_channels=3, out_channels=4, kernel_size=3))


def runner_of(tmp_path, backbone):
    cfg = digits_config(tmp_path)
    cfg.model.type = "ImageClassifier"  # layers that conv_cfg builds have not been looked at before
    cfg.model.backbone.update(type=backbone, conv_cfg=dict(type="ENCConv2d"))
    return build_runner(cfg)


def test_a_free_weight_that_the_network_reads_itself_ends_training_before_the_first_step(tmp_path):
    runner = runner_of(tmp_path, "StemInAHelper")
    with pytest.raises(ValueError, match=r"layer 'backbone.conv1' .*StemInAHelper reads its weight.*exclude="):
        runner.train()
    assert runner.iter == 0


@pytest.fixture
def logged(caplog):
    """Trains a runner and returns the text of its log."""

    def train(runner):
        runner.logger.addHandler(caplog.handler)
        try:
            runner.train()
        finally:
            runner.logger.removeHandler(caplog.handler)
        return caplog.text

    return train


def test_layers_that_do_not_run_are_named_and_training_goes_on(tmp_path, logged):
    text = logged(runner_of(tmp_path, "IdleLayer"))
    assert "1 ENC layers did not run on the first batch: backbone.idle" in text


@pytest.mark.parametrize("changes", [{}, {"constructor": "DefaultOptimWrapperConstructor"}])
def test_weights_that_decay_without_the_rules_of_enc_are_warned_of(tmp_path, logged, changes):
    cfg = digits_config(tmp_path)
    cfg.optim_wrapper.update(changes)
    assert ("the weights of 10 ENC layers decay without the epsilon shift" in logged(build_runner(cfg))) == bool(
        changes
    )
