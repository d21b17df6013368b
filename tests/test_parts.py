"""A config's parts are told by the class that the registry finds, however the config names them."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import build_runner, digits_config
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS, MODEL_WRAPPERS, OPTIM_WRAPPERS
from mmpretrain.datasets import PackInputs
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead

from enc_plugin.build import build_model, part_class
from enc_plugin.datasets import Digits
from enc_plugin.deploy import stock_config
from enc_plugin.engine import BFloat16OptimWrapper, ENCCheckpointHook
from enc_plugin.engine.amp import without_cuda
from enc_plugin.engine.efolds import config_efolds
from enc_plugin.engine.limits import check_distributed
from enc_plugin.models import ENCImageClassifier, ResNetCIFAR6n

SPELLINGS = ["CheckpointHook", "mmengine.CheckpointHook", "mmengine.hooks.CheckpointHook", CheckpointHook]


@pytest.mark.parametrize("kind", SPELLINGS)
def test_every_spelling_is_the_class(kind):
    assert part_class(kind, HOOKS) is CheckpointHook
    assert part_class(dict(type=kind, interval=1), HOOKS) is CheckpointHook


@pytest.mark.parametrize("kind", [None, "NoSuchHook", "no.such.Hook", "mmengine.hooks.NoSuchHook"])
def test_what_names_nothing_is_none(kind):
    assert part_class(dict(type=kind), HOOKS) is None
    assert part_class({}, HOOKS) is None


def test_checkpoints_are_safe_however_their_hook_is_given(tmp_path):
    runner = build_runner(digits_config(tmp_path))
    for hook in (*(dict(type=kind, interval=1) for kind in SPELLINGS), CheckpointHook(interval=1)):
        runner._hooks = []
        runner.register_hook(hook)
        assert [type(hook) for hook in runner.hooks] == [ENCCheckpointHook]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA it stays")
@pytest.mark.parametrize("kind", ["AmpOptimWrapper", "mmengine.AmpOptimWrapper", "mmengine.optim.AmpOptimWrapper"])
def test_mixed_precision_without_cuda_by_every_spelling(kind):
    for part in (kind, part_class(kind, OPTIM_WRAPPERS)):
        found = without_cuda(dict(type=part, loss_scale="dynamic"), logging.getLogger())
        assert part_class(found, OPTIM_WRAPPERS) is BFloat16OptimWrapper
        assert "loss_scale" not in found


def test_sharding_is_refused_by_its_full_name():
    kind = "mmengine.model.MMFullyShardedDataParallel"
    assert part_class(kind, MODEL_WRAPPERS).__name__ == "MMFullyShardedDataParallel"
    with pytest.raises(ValueError, match="FullyShardedDataParallel splits the weights"):
        check_distributed(None, dict(type=kind), torch.nn.Linear(2, 2))


def test_efolds_know_the_optimizer_by_its_class(tmp_path):
    cfg = digits_config(tmp_path)
    expected = config_efolds(cfg, 3)
    for kind in ("torch.optim.SGD", torch.optim.SGD):
        cfg.optim_wrapper.optimizer.type = kind
        assert config_efolds(cfg, 3) == expected


def test_a_config_of_classes_is_built_and_has_a_stock_twin():
    conv = dict(type="enc_plugin.layers.ENCConv2d", variant="wn")
    dataset = dict(type=Digits, split="test", pipeline=[dict(type=PackInputs)])
    cfg = Config(
        dict(
            model=dict(
                type=ENCImageClassifier,
                enc=dict(variant="wn"),
                backbone=dict(type=ResNetCIFAR6n, depth=8, conv_cfg=conv),
                neck=dict(type=GlobalAveragePooling),
                head=dict(type=LinearClsHead, num_classes=10, in_channels=64),
            ),
            data_preprocessor=dict(num_classes=10, mean=[77.9] * 3, std=[95.9] * 3, to_rgb=False),
            test_dataloader=dict(dataset=dataset),
        )
    )
    stock = stock_config(cfg)
    assert stock.model.backbone.conv_cfg == dict(type="Conv2d")
    assert type(build_model(cfg)) is ENCImageClassifier
    model = build_model(stock)
    assert type(model) is ImageClassifier
    assert model.data_preprocessor.mean.flatten().tolist() == pytest.approx([77.9] * 3)
