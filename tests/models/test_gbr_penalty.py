import copy

import pytest
import torch
from helpers import digits_config, scalars, train
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample

from enc_plugin import fold
from enc_plugin.functional import gbr

BACKBONE = dict(type="ResNetCIFAR6n", depth=8)
HEAD = dict(type="LinearClsHead", num_classes=10, in_channels=64, loss=dict(type="CrossEntropyLoss"))


def classifier(kind="ENCImageClassifier", **options):
    torch.manual_seed(0)
    cfg = dict(type=kind, backbone=BACKBONE, neck=dict(type="GlobalAveragePooling"), head=HEAD, **options)
    return MODELS.build(cfg)


def batch(count=6):
    samples = [DataSample().set_gt_label(i % 10) for i in range(count)]
    return torch.randn(count, 3, 8, 8), samples


@pytest.mark.parametrize("kind", ["ENCImageClassifier", "GBRImageClassifier"])
def test_with_frozen_statistics_the_term_is_the_mean_gbr(kind):
    model = classifier(kind, gbr_penalty=dict(weight=0.5, projections=10)).eval().double()
    inputs, samples = batch()
    losses = model.loss(inputs.double(), samples)
    assert set(losses) == {"loss", "loss_gbr"}
    torch.testing.assert_close(losses["loss_gbr"], 0.5 * gbr(model, inputs.double()).mean(), rtol=1e-9, atol=0)


def test_a_backbone_that_begins_in_place_has_the_term_of_its_inputs():
    model = classifier(gbr_penalty=dict(weight=0.5, projections=10)).eval()
    inputs, samples = batch()
    expected = model.loss(inputs, samples)
    model.backbone.register_forward_pre_hook(lambda backbone, args: args[0].mul_(1.0))
    assert model.loss(inputs, samples) == expected


def test_statistics_are_updated_once_a_step_and_as_without_the_term():
    model, plain = classifier(gbr_penalty=dict(weight=0.1)).train(), classifier().train()
    inputs, samples = batch()
    losses, plain_losses = model.loss(inputs, samples), plain.loss(inputs, samples)
    torch.testing.assert_close(losses["loss"], plain_losses["loss"])
    assert set(plain_losses) == {"loss"}
    for (key, own), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(own, other, msg=key)
    assert model.head.fc.norm.num_batches_tracked == 1


def test_the_term_in_train_mode_has_the_gradient_of_the_literal_norm():
    """One output, so that one projection has no chance in it; batch norm couples the samples, as in training."""
    head = dict(HEAD, num_classes=1)
    model = MODELS.build(
        dict(
            type="GBRImageClassifier",
            backbone=BACKBONE,
            neck=dict(type="GlobalAveragePooling"),
            head=head,
            gbr_penalty=dict(weight=1.0),
        )
    )
    model.train().double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    weight = model.head.fc.weight

    def norm(w):
        other, v = copy.deepcopy(model), x.clone().requires_grad_()
        other.head.fc.weight.data.copy_(w)
        return torch.autograd.grad(other(v).sum(), v)[0].square().sum() / len(x)

    samples = [DataSample().set_gt_score(torch.ones(1)) for _ in range(4)]
    (found,) = torch.autograd.grad(model.loss(x, samples)["loss_gbr"], weight)
    eps, direction = 1e-6, torch.randn_like(weight)
    numeric = (norm(weight.detach() + eps * direction) - norm(weight.detach() - eps * direction)) / (2 * eps)
    assert (found * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-5)


def test_training_with_the_term_lowers_the_gbr(tmp_path):
    values = {}
    for weight in (0, 0.1):
        cfg = digits_config(
            tmp_path / str(weight),
            "resnet8_1xb64",
            epochs=3,
            model__type="GBRImageClassifier",
            model__gbr_penalty=dict(weight=weight),
            custom_hooks=[dict(type="GBRHook", num_samples=64, projections=None)],
            default_hooks__logger__interval=1,
        )
        train(cfg)
        lines = scalars(tmp_path / str(weight))
        values[weight] = [line["gbr/logits"] for line in lines if "gbr/logits" in line]
        assert [line["loss_gbr"] > 0 for line in lines if "loss_gbr" in line] == [weight > 0] * 9
    assert values[0.1][0] == values[0][0]
    assert values[0.1][-1] < values[0][-1]


def test_folding_leaves_a_stock_classifier():
    model = classifier(gbr_penalty=dict(weight=0.1)).eval()
    plain = fold(model)
    assert type(plain).__name__ == "ImageClassifier"
    assert not hasattr(plain, "gbr_penalty")
    assert set(plain.loss(*batch())) == {"loss"}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(weight=-1), "weight"),
        (dict(weight=1, projections=0), "projections"),
        (dict(weight=1, projections=None), "projections"),
    ],
)
def test_options_out_of_range_are_named(options, name):
    with pytest.raises((ValueError, TypeError), match=name):
        classifier(gbr_penalty=options)
