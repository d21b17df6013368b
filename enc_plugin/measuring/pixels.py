"""Pictures of a measurement: packed samples as one batch, the pixel space 0..255, and the network behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PIXEL_MAX = 255.0


def stack(packed: Sequence[dict]) -> tuple[Tensor, Tensor | None]:
    """Pixels ``(N, C, H, W)`` in their own dtype, and labels ``(N,)``, None unless each packed sample has one.

    Raises:
        ValueError: If sizes differ, or a sample has no picture.
    """
    if any("inputs" not in sample for sample in packed):
        raise ValueError(
            "pipeline: there is no picture to pack; end it with PackInputs, and begin it with a loading step, such as "
            "LoadImageFromFile, if it is to take the place of the dataset's own loading"
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
    """:func:`stack` of the samples that are not None, for an attack: it needs pixels in 0..255 and true labels.

    Raises:
        ValueError: If sizes differ, a pixel is out of the range, or a sample has no single label.
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
    """Smallest and largest of many pixels, and whether they are floating point."""

    low: float = 0.0
    high: float = 0.0
    floating: bool = False

    @classmethod
    def of(cls, pixels: Tensor) -> PixelSpan:
        """That of a tensor."""
        if not pixels.numel():
            return cls()
        low, high = (bound.item() for bound in pixels.aminmax())
        return cls(low, high, pixels.is_floating_point())

    @classmethod
    def join(cls, spans: Sequence[PixelSpan]) -> PixelSpan:
        """That of all together."""
        spans = [*spans] or [cls()]
        return cls(min(s.low for s in spans), max(s.high for s in spans), any(s.floating for s in spans))

    def check(self, whole: bool = True) -> None:
        """Raise ``ValueError`` unless the range is 0..255.

        Args:
            whole: These are all pixels. Of a part, 0..1 says nothing: it may be a dark picture.
        """
        if not 0 <= self.low <= self.high <= PIXEL_MAX or (whole and self.floating and 0 < self.high <= 1):
            raise ValueError(
                f"dataset: expected pixels in 0..255, got {self.low:g}..{self.high:g}; the unit is 1/255 of that "
                "range, so leave scaling and normalisation to the model's data_preprocessor (mean, std) and not to the "
                "pipeline"
            )


def preprocess(model: nn.Module, pixels: Tensor) -> Tensor:
    """What the network receives for ``pixels``: its ``data_preprocessor`` applies mean, std and channel order."""
    return model.data_preprocessor({"inputs": pixels}, training=False)["inputs"]


class PixelClassifier(nn.Module):
    """Logits of a classifier as a function of pixels: its ``data_preprocessor`` (mean, std, channel order) lies within.

    Runs in float32 whatever autocast is active around it, as mmengine's validation does.

    Args:
        model: Classifier of mmpretrain: ``ENCImageClassifier``, ``ImageClassifier``, ``TimmClassifier``.

    Shape:
        ``(N, C, H, W)`` pixels in 0..255, as the pipeline's ``PackInputs`` delivers them -> ``(N, classes)`` logits.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training  # train() would reach into the model and wake frozen layers

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise as the model's data preprocessor does, then classify."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self.model(preprocess(self.model, pixels), mode="tensor")
