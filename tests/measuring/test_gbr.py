"""measure_gbr differentiates what the head predicts, and says in which unit its inputs are."""

from __future__ import annotations

import copy

import pytest
import torch
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn
from torch.utils.data import Dataset

from enc_plugin.measuring.gbr import input_unit, measure_gbr, pick_batch_size
from enc_plugin.measuring.robustness import measure_robustness
from enc_plugin.measuring.samples import FixedSamples

HEADS = {
    "softmax": (dict(type="mmpretrain.LinearClsHead", num_classes=3, in_channels=64), lambda z: z.softmax(-1)),
    "sigmoid": (dict(type="mmpretrain.MultiLabelLinearClsHead", num_classes=3, in_channels=64), torch.sigmoid),
    "cosine": (dict(type="mmpretrain.ArcFaceClsHead", num_classes=3, in_channels=64), lambda z: z.softmax(-1)),
    "temperature": (dict(type="_WarmHead", num_classes=3, in_channels=64), lambda z: (z / 4).softmax(-1)),
}


@MODELS.register_module(force=True)
class _WarmHead(MODELS.get("mmpretrain.LinearClsHead")):
    """Scores that are softer than the softmax of the logits."""

    def _get_predictions(self, cls_score, data_samples):
        return super()._get_predictions(cls_score / 4, data_samples)


class Noise(Dataset):
    """Five pictures, packed."""

    def __init__(self):
        self.pixels = torch.randint(0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"inputs": self.pixels[index], "data_samples": DataSample().set_gt_label(index % 3)}


def classifier(head, **preprocessor):
    torch.manual_seed(0)
    return MODELS.build(
        dict(
            type="mmpretrain.ImageClassifier",
            backbone=dict(type="ResNetCIFAR6n", depth=8),
            neck=dict(type="mmpretrain.GlobalAveragePooling"),
            head=head,
            data_preprocessor=dict(type="mmpretrain.ClsDataPreprocessor", **preprocessor),
        )
    ).eval()


NORMALISED = dict(mean=[120.0] * 3, std=[60.0] * 3)


@pytest.mark.parametrize("space", ["normalized", "pixel"])
@pytest.mark.parametrize("head", HEADS)
def test_probabilities_are_those_that_the_head_predicts(head, space):
    config, squash = HEADS[head]
    model, data = classifier(config, **NORMALISED), Noise()
    found = measure_gbr(model, FixedSamples(data, [], range(5), 2), output="probs", space=space)
    model.double()
    norms = []
    for pixels in data.pixels.double():
        x = (pixels - 120) / 60
        jacobian = torch.autograd.functional.jacobian(lambda v: squash(model(v[None], mode="tensor")[0]), x)
        norms.append(jacobian.square().sum() / (60**2 if space == "pixel" else 1))
    torch.testing.assert_close(found.values, torch.stack(norms), rtol=1e-3, atol=0)


class _ScaledInPlace(nn.Sequential):
    def forward(self, x):
        return super().forward(x.mul_(2))


@pytest.mark.parametrize("head", HEADS)
def test_a_network_that_changes_its_input_in_place_is_measured_at_the_input(head):
    model = classifier(HEADS[head][0], **NORMALISED)
    plain = copy.deepcopy(model)
    model.backbone.conv1 = _ScaledInPlace(model.backbone.conv1)
    with torch.no_grad():
        plain.backbone.conv1.weight.mul_(2)
    found, expected = (measure_gbr(m, FixedSamples(Noise(), [], range(5), 2), output="probs") for m in (model, plain))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("head", ["sigmoid", "temperature"])
def test_the_softmax_of_the_true_class_is_refused_where_the_head_predicts_something_else(head):
    model = classifier(HEADS[head][0], **NORMALISED)
    with pytest.raises(
        ValueError, match="'label_prob' is the softmax of the true class, but the scores of .*Head are not the softmax"
    ):
        measure_gbr(model, FixedSamples(Noise(), [], range(5), 2), output="label_prob")


def test_scores_of_a_head_with_several_logits_are_measured():
    class Two(nn.Module):  # a backbone with two kinds of features, as Conformer
        def forward(self, x):
            return ([x.mean((2, 3)), x[:, :, 0, 0]],)

    model = classifier(dict(type="mmpretrain.ConformerHead", num_classes=3, in_channels=[3, 3]), **NORMALISED)
    model.backbone, model.neck = Two(), None
    samples = FixedSamples(Noise(), [], range(5), 2)
    found = measure_gbr(model, samples, output="probs")
    x = ((Noise().pixels.double() - 120) / 60).requires_grad_()
    probs = sum(model.double()(x, mode="tensor")).softmax(-1)
    grads = [torch.autograd.grad(probs[:, i].sum(), x, retain_graph=True)[0] for i in range(3)]
    torch.testing.assert_close(found.values, sum(g.square().sum((1, 2, 3)) for g in grads), rtol=1e-4, atol=0)
    for measure in (lambda: measure_gbr(model.float(), samples), lambda: measure_robustness(model, Noise(), [1])):
        with pytest.raises(TypeError, match="one tensor of logits .* got a tuple from ConformerHead.*output 'probs'"):
            measure()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_measured_as_a_copy_in_float32(dtype):
    model, data = classifier(HEADS["softmax"][0], **NORMALISED).to(dtype), Noise()
    samples = FixedSamples(data, [], range(5), 2)
    for measure in (lambda net: measure_gbr(net, samples).mean, lambda net: measure_robustness(net, data, [1]).clean):
        with pytest.raises(ValueError, match=r"float32 or float64.*got torch\.b?float16 in .backbone.*float\(\)"):
            measure(model)
        measure(copy.deepcopy(model).float())


@pytest.mark.parametrize("options", [NORMALISED, {}], ids=["normalised", "not normalised"])
def test_a_network_in_double_precision_has_the_gbr_and_the_robustness_of_its_float32_copy(options):
    model, data = classifier(HEADS["softmax"][0], **options), Noise()
    samples = FixedSamples(data, [], range(5), 5)
    for space in ("normalized", "pixel"):
        single, double = (measure_gbr(net, samples, space=space) for net in (model, copy.deepcopy(model).double()))
        torch.testing.assert_close(double.values, single.values, rtol=1e-3, atol=0)
    assert measure_robustness(model.double(), data, [1]).num_samples == 5


def test_a_head_without_scores_is_refused_by_name():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.data_preprocessor = classifier(HEADS["softmax"][0]).data_preprocessor
            self.head = nn.Linear(3, 3)

        def forward(self, inputs, mode):
            if mode != "tensor":
                raise NotImplementedError(mode)
            return self.head(inputs.mean((2, 3)))

    samples = FixedSamples(Noise(), [], range(5), 2)
    assert measure_gbr(Bare().eval(), samples).mean > 0
    with pytest.raises(ValueError, match="'probs' needs a head that predicts scores .* but Linear does not"):
        measure_gbr(Bare().eval(), samples, output="probs")


def test_the_unit_of_the_input_says_whether_the_model_normalises():
    head = HEADS["softmax"][0]
    assert input_unit(classifier(head, **NORMALISED), "normalized") == "per squared standard deviation of the input"
    assert "does not normalise" in input_unit(classifier(head), "normalized")
    assert input_unit(classifier(head), "pixel") == "per squared gray level, 1/255 of the pixel range"


class _Counting(nn.Module):
    """Logits of a linear map, with the sizes of the batches that came."""

    def __init__(self, most=100, mix=False):
        super().__init__()
        self.net, self.sizes, self.most, self.mix = classifier(HEADS["softmax"][0], **NORMALISED), [], most, mix
        self.data_preprocessor = self.net.data_preprocessor

    def forward(self, inputs, mode):
        self.sizes.append(len(inputs))
        if len(inputs) > self.most:
            raise torch.OutOfMemoryError
        return self.net(inputs - inputs.mean(0) if self.mix else inputs, mode=mode)


class _Many(Noise):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return super().__getitem__(index % 5)


def test_a_measurement_checks_its_network_once_and_on_a_few_samples():
    model = _Counting()
    measure_gbr(model, FixedSamples(_Many(), [], range(40), 10))
    assert model.sizes == [8, 2, 10, 10, 10, 10]  # eight samples, one of which is taken with its copy too
    with pytest.raises(ValueError, match="depends on other samples"):
        measure_gbr(_Counting(mix=True), FixedSamples(_Many(), [], range(40), 10))


def test_there_is_no_median_of_estimates_because_their_noise_lowers_it():
    model, samples = classifier(HEADS["softmax"][0], **NORMALISED), FixedSamples(_Many(), [], range(40), 40)
    model.head.fc.weight.data[:] = model.head.fc.weight.data[0]  # J has rank 1
    exact = measure_gbr(model, samples)
    found = [measure_gbr(model, samples, projections=1, seed=seed) for seed in range(10)]
    # An estimate is 3 cos^2 of the exact value, where |cos| is uniform between 0 and 1: the median is 3/4 of it.
    assert sum(one.values.quantile(0.5) for one in found) / 10 < 0.85 * exact.median
    assert {one.median for one in found} == {None}
    assert measure_gbr(model, samples, output="label_prob", projections=1).median > 0


def test_batches_that_do_not_fit_into_the_memory_are_split_and_give_the_same_values():
    samples = FixedSamples(_Many(), [], range(40), 20)
    whole, split = (measure_gbr(_Counting(most), samples, projections=2) for most in (100, 8))
    torch.testing.assert_close(split.values, whole.values, rtol=1e-5, atol=0)
    with pytest.raises(torch.OutOfMemoryError):
        measure_gbr(_Counting(most=0), samples)


def test_a_gpu_measures_in_batches_of_the_training_batch_and_a_cpu_in_those_of_32():
    assert pick_batch_size(torch.device("cpu"), 256) == 32
    assert [pick_batch_size(torch.device("cuda"), size) for size in (None, 8, 256)] == [32, 32, 256]
