"""Images of a measurement: collating samples, checking their pixel range, and classifying pixels in 0..255."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..refused import describe

PIXEL_MAX = 255.0


def stack(packed: Sequence[dict]) -> tuple[Tensor, Tensor | None]:
    """Stack packed samples to pixels ``(N, C, H, W)`` and labels ``(N,)`` (None unless each sample has one label).

    Raises:
        ValueError: If sizes differ, or a sample does not have exactly one image.
    """
    if any("inputs" not in sample for sample in packed):
        raise ValueError(
            "pipeline: expected packed samples with an image, got one without; end the pipeline with PackInputs, and "
            "begin it with a loading step such as LoadImageFromFile if it replaces the loading steps of the dataset"
        )
    several = next((sample["inputs"] for sample in packed if not isinstance(sample["inputs"], Tensor)), None)
    if several is not None:
        raise ValueError(
            f"pipeline: expected one image for each sample, got a {type(several).__name__} of {len(several)}; measure "
            "with a pipeline without test-time augmentation (TestTimeAug) or several views"
        )
    shapes = {tuple(sample["inputs"].shape) for sample in packed}
    if len(shapes) > 1:
        raise ValueError(
            f"pipeline: expected images of one size, got {', '.join(map(str, sorted(shapes)))}; resize or crop "
            "them in the test pipeline, or use batch_size=1"
        )
    labels = [sample["data_samples"].get("gt_label") for sample in packed]
    known = all(label is not None and label.numel() == 1 for label in labels)
    return torch.stack([sample["inputs"] for sample in packed]), torch.cat(labels) if known else None


def collate_pixels(samples: Sequence[dict | None]) -> tuple[Tensor, Tensor]:
    """:func:`stack` the samples that are not None, for an attack, which needs pixels in 0..255 and true labels.

    Raises:
        ValueError: If sizes differ, a pixel is out of range, or a sample does not have exactly one label.
    """
    samples = [sample for sample in samples if sample is not None]
    if not samples:
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    pixels, labels = stack(samples)
    PixelSpan.of(pixels).check(whole=False)
    if labels is None:
        raise ValueError("dataset: expected one gt_label for each sample; attacks use the true label")
    return pixels, labels


@dataclass(frozen=True)
class PixelSpan:
    """Smallest and largest value of pixels, and whether they are floating point."""

    low: float = 0.0
    high: float = 0.0
    floating: bool = False

    @classmethod
    def of(cls, pixels: Tensor) -> PixelSpan:
        """The span of a tensor."""
        if not pixels.numel():
            return cls()
        low, high = (bound.item() for bound in pixels.aminmax())
        return cls(low, high, pixels.is_floating_point())

    @classmethod
    def join(cls, spans: Sequence[PixelSpan]) -> PixelSpan:
        """The span of several spans together."""
        spans = [*spans] or [cls()]
        return cls(min(s.low for s in spans), max(s.high for s in spans), any(s.floating for s in spans))

    def check(self, whole: bool = True) -> None:
        """Raise ``ValueError`` unless the range is 0..255.

        Args:
            whole: Whether the span is of all pixels. In a part of them, 0..1 may be a dark image and does not raise.
        """
        if not 0 <= self.low <= self.high <= PIXEL_MAX or (whole and self.floating and 0 < self.high <= 1):
            raise ValueError(
                f"dataset: expected pixels in 0..255, got {self.low:g}..{self.high:g}; move scaling and normalisation "
                "from the pipeline to the model's data_preprocessor (mean, std)"
            )


def preprocess(model: nn.Module, pixels: Tensor) -> Tensor:
    """Apply the model's ``data_preprocessor`` (mean, std, channel order) to ``pixels``, in the dtype of its weights.

    Raises:
        ValueError: If it does not take a single batch of images, as that of self-supervised models.
    """
    try:
        inputs = model.data_preprocessor({"inputs": pixels}, training=False)["inputs"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        kind = type(model.data_preprocessor).__name__
        raise ValueError(
            f"model: expected a classifier of single images, but the {kind} of {type(model).__name__} does not take a "
            f"batch of them ({describe(error)})"
        ) from error
    return inputs.to(next(model.parameters()).dtype)


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits ``(N, C)`` of ``inputs``, which the ``data_preprocessor`` has processed.

    Raises:
        TypeError: If the head does not compute one tensor.
    """
    found = model(inputs, mode="tensor")
    if not isinstance(found, Tensor):
        head = type(getattr(model, "head", model)).__name__
        raise TypeError(
            f"model: expected one tensor of logits (N, C), got a {type(found).__name__} from {head}; of several tasks, "
            "measure a model with one of the heads; GBR can also be that of predicted scores (output 'probs')"
        )
    return found


class PixelClassifier(nn.Module):
    """Logits of a classifier as a function of pixels, including its ``data_preprocessor`` (mean, std, channel order).

    Runs without autocast, as mmengine's validation does.

    Args:
        model: Classifier of mmpretrain: ``ENCImageClassifier``, ``ImageClassifier``, ``TimmClassifier``.

    Shape:
        ``(N, C, H, W)`` pixels in 0..255, as from ``PackInputs`` -> ``(N, classes)`` logits.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training  # train() would change the model, including its frozen layers

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise and classify.

        Raises:
            ValueError: If the outputs are not one logit for each class of the head.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            logits = logits_of(self.model, preprocess(self.model, pixels))
        head = getattr(self.model, "head", None)
        classes = getattr(head, "num_classes", None)
        if classes is not None and logits.shape[-1:] != (classes,):  # LeNet5 squeezes the outputs of a single image
            raise ValueError(
                f"model: expected a logit for each of the {classes} classes of {type(head).__name__}, got outputs of "
                f"shape {tuple(logits.shape)}; {type(self.model).__name__} returns something else, such as features, "
                "so use a classifier"
            )
        return logits
