"""measure_robustness against attacks written out by hand, on any number of processes, and what it warns of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn
from torch.utils.data import Dataset

from enc_plugin.measuring.pixels import PixelClassifier
from enc_plugin.measuring.robustness import Robustness, measure_robustness
from enc_plugin.measuring.spread import one_of_each_section, spread

MEAN, STD = [120.0, 115.0, 100.0], [60.0, 65.0, 70.0]
CLASSIFIERS = {
    "ENCImageClassifier": dict(
        type="ENCImageClassifier",
        backbone=dict(type="ResNetCIFAR6n", depth=8),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=10, in_channels=64),
    ),
    "ImageClassifier": dict(
        type="mmpretrain.ImageClassifier",
        backbone=dict(type="ResNetCIFAR6n", depth=8),
        neck=dict(type="mmpretrain.GlobalAveragePooling"),
        head=dict(type="mmpretrain.LinearClsHead", num_classes=10, in_channels=64),
    ),
    "TimmClassifier": dict(type="mmpretrain.TimmClassifier", model_name="test_resnet", num_classes=10),
}


class Noise(Dataset):
    """Coloured noise in 0..255, packed as a pipeline packs it."""

    def __init__(self, count: int = 21, size: int = 16):
        generator = torch.Generator().manual_seed(3)
        self.pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(0, 10, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"inputs": self.pixels[index], "data_samples": DataSample().set_gt_label(self.labels[index].item())}


class Stub(nn.Module):
    """Classifier whose logits are a function of the pixels: what PixelClassifier needs of a model and no more."""

    def __init__(self, logits):
        super().__init__()
        self.data_preprocessor = ClsDataPreprocessor()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.logits = logits

    def forward(self, inputs, mode):
        return self.logits(inputs)


@pytest.mark.parametrize("to_rgb", [False, True])
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_accuracy_is_that_of_an_attack_written_out_by_hand(classifier, to_rgb):
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            CLASSIFIERS[classifier],
            data_preprocessor=dict(type="mmpretrain.ClsDataPreprocessor", mean=MEAN, std=STD, to_rgb=to_rgb),
        )
    )
    data = Noise()
    found = measure_robustness(model, data, [2, 16], batch_size=8)

    model.eval()

    def logits(unit):
        x = unit.flip(1) if to_rgb else unit
        x = (x * 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return model.model(x) if classifier == "TimmClassifier" else model.head(model.extract_feat(x))

    unit = (data.pixels / 255).requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits(unit), data.labels), unit)
    for eps in (0, 2, 16):
        with torch.no_grad():
            predicted = logits((unit + eps / 255 * gradient.sign()).clamp(0, 1)).argmax(1)
        expected = (predicted == data.labels).double().mean().item() * 100
        assert (found.fgsm[eps] if eps else found.clean) == pytest.approx(expected)
    assert found.num_samples == 21


def test_attack_runs_in_float32_under_autocast():
    model = MODELS.build(
        dict(CLASSIFIERS["ImageClassifier"], data_preprocessor=dict(type="mmpretrain.ClsDataPreprocessor"))
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert PixelClassifier(model.eval())(torch.rand(2, 3, 8, 8)).dtype == torch.float32


def test_wrapping_a_model_leaves_frozen_layers_frozen():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    model[0].eval()
    assert PixelClassifier(model).training
    assert [module.training for module in model] == [False, True]


def test_samples_without_gradient_are_counted():
    # Every third image is black, and the logits of black images are flat.
    data = Noise(count=9)
    data.pixels[::3] = 0
    data.pixels[1::3] = data.pixels[1::3].clamp(min=1)
    found = measure_robustness(Stub(lambda x: x.relu().flatten(1)[:, :10] * (x.sum((1, 2, 3)) > 0)[:, None]), data, [1])
    assert found.zero_grad == 3 / 9


def test_networks_that_squeeze_a_batch_of_one_are_attacked_as_others():
    flat, squeezing = Stub(lambda x: x.flatten(1)[:, :10]), Stub(lambda x: x.flatten(1)[:, :10].squeeze())
    found, expected = (measure_robustness(model, Noise(), [1, 16], batch_size=7) for model in (squeezing, flat))
    assert (found.clean, found.fgsm) == (expected.clean, expected.fgsm)


def test_samples_are_spread_over_a_sorted_dataset():
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(3, None) == spread(3, 7) == [0, 1, 2]
    labels = np.repeat(np.arange(10), 1000)
    assert np.bincount(labels[spread(10000, 100)]).tolist() == [10] * 10
    assert np.bincount(labels[one_of_each_section(10000, 100)]).tolist() == [10] * 10


@pytest.mark.parametrize("classes", [2, 5, 10, 100])
def test_attacked_samples_are_of_all_classes_where_classes_take_turns(classes):
    chosen = one_of_each_section(10000, 1000)
    assert len(set(chosen)) == 1000
    counts = np.bincount(np.array(chosen) % classes, minlength=classes)
    assert abs(counts - 1000 / classes).max() <= 4
    assert one_of_each_section(7, None) == one_of_each_section(7, 9) == list(range(7))


def test_a_network_that_knows_one_class_is_right_as_often_as_that_class_occurs():
    data = Noise(count=100)
    data.labels = torch.arange(100) % 10
    found = measure_robustness(Stub(lambda x: x.sum((1, 2, 3))[:, None] * torch.eye(10)[0]), data, [1], num_samples=10)
    assert 0 < found.clean <= 20  # it is 100 of samples with equal gaps


def test_pgd_is_reproducible_and_batches_do_not_share_its_noise():
    # With steps far smaller than eps the random start shows through: record what the model sees.
    seen = []

    def logits(x):
        seen.append(x.detach().clone())
        return x.flatten(1)[:, :10]

    data = Noise(count=4)
    data.pixels[:] = 128
    first = measure_robustness(Stub(logits), data, [8], batch_size=2, pgd_steps=1)
    starts = [x[0] for x in seen if not torch.equal(x, torch.full_like(x, 128))]
    assert not torch.equal(starts[0], starts[-1])
    again = measure_robustness(Stub(logits), data, [8], batch_size=2, pgd_steps=1)
    assert (again.pgd, again.fgsm) == (first.pgd, first.fgsm)


def result(**values) -> Robustness:
    sound = dict(num_samples=100, clean=90.0, fgsm={1: 60.0, 8: 20.0}, pgd={1: 59.0, 8: 12.0}, pgd_steps=10)
    return Robustness(**(sound | dict(zero_grad=0.0, seconds=1.0) | values))


def test_sound_result_has_no_warning():
    assert result().warnings == []
    assert result(zero_grad=0.01).warnings == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (dict(clean=0.0, fgsm={1: 0.0}, pgd={}), "clean accuracy is 0 %"),
        (dict(fgsm={1: 60.0, 8: 91.0}, pgd={}), "FGSM at eps 8 raises the accuracy from 90.00 to 91.00 %"),
        (dict(pgd={8: 90.5}), "PGD-10 at eps 8 raises the accuracy"),
        (dict(zero_grad=0.011), "1.1% of the samples have an all-zero gradient"),
        (dict(pgd={8: 9.0}), "at eps 8 PGD-10 leaves 9.00 % and FGSM 20.00 %"),
    ],
)
def test_what_speaks_against_a_result_is_named(values, text):
    (warning,) = result(**values).warnings
    assert text in warning


def test_images_of_different_sizes_are_refused():
    data = [{"inputs": torch.zeros(3, size, size), "data_samples": DataSample().set_gt_label(0)} for size in (4, 5)]
    with pytest.raises(ValueError, match="expected images of one size"):
        measure_robustness(Stub(lambda x: x), data, [1])


@pytest.mark.parametrize(
    ("logits", "why"),
    [
        (lambda x: (x - x.mean(0)).flatten(1)[:, :10], "depends on other samples"),
        (lambda x: (x + torch.randn_like(x)).flatten(1)[:, :10], "it is random"),
    ],
)
def test_accuracies_that_depend_on_the_batch_or_on_chance_are_refused(logits, why):
    with pytest.raises(ValueError, match=why):
        measure_robustness(Stub(logits).eval(), Noise(), [1])


def test_sample_without_a_label_is_refused():
    data = [{"inputs": torch.zeros(3, 4, 4, dtype=torch.uint8), "data_samples": DataSample()}]
    with pytest.raises(ValueError, match="expected one gt_label"):
        measure_robustness(Stub(lambda x: x), data, [1])


def test_features_are_not_taken_for_logits():
    encoder = nn.Sequential(nn.Conv2d(3, 24, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = dict(type="mmpretrain.ArcFaceClsHead", num_classes=10, in_channels=24)
    model = MODELS.build(
        dict(type="mmpretrain.ImageToImageRetriever", image_encoder=encoder, head=head, prototype=torch.zeros(3, 24))
    )
    with pytest.raises(ValueError, match=r"a logit for each of the 10 classes of ArcFaceClsHead, .* shape \(\d+, 24\)"):
        measure_robustness(model.eval(), Noise(), [4])
