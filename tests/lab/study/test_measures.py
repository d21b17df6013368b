"""Margins by hand, losses against torch, and the residual bound against the exact GBR of the network itself."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS

import enc_plugin  # noqa: F401
from enc_plugin import audit
from enc_plugin.functional import gbr
from lab.study.measures import evaluate, margin, residual_bound


def test_a_margin_is_the_true_logit_less_the_largest_other():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert margin(logits, torch.tensor([0, 1])).tolist() == [1.0, -2.0]


@pytest.fixture
def network():
    torch.manual_seed(0)
    backbone = dict(type="ResNetCIFAR6n", depth=20, norm_cfg=dict(type="BN"), zero_init_residual=False)
    head = dict(type="LinearClsHead", num_classes=4, in_channels=64)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(
            dict(
                type="ImageClassifier",
                data_preprocessor=dict(mean=[0.0] * 3, std=[1.0] * 3),
                backbone=backbone,
                neck=dict(type="GlobalAveragePooling"),
                head=head,
            )
        )
    model.init_weights()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 3)
            torch.nn.init.uniform_(module.weight, 0.2, 1)
    return model.double().eval()


def test_the_residual_bound_is_one_and_the_product_over_all_layers_is_none(network):
    inputs = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".conv2." in name:
                parameter.mul_(1e-3)  # the branches hardly count
    folded = audit(network, folded=True, inputs=inputs)
    values = gbr(lambda x: network(x, mode="tensor"), inputs).log()
    assert values.max().item() <= residual_bound(network, folded, inputs)
    assert folded.map_chain["log_product"] < values.min().item()


def test_an_evaluation_is_that_of_torch(network):
    network.float()
    pixels, labels = torch.randint(256, (7, 3, 8, 8)).float(), torch.randint(4, (7,))
    samples = [dict(inputs=x, data_samples=_Label(y)) for x, y in zip(pixels, labels, strict=True)]
    found = evaluate(network, samples)
    with torch.no_grad():
        logits = network(pixels, mode="tensor")
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert found["samples"] == 7


class _Label(dict):
    def __init__(self, label):
        super().__init__(gt_label=label[None])
