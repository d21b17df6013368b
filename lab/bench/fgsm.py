"""FGSM with four eps on one batch, compared with torchattacks and ART, which compute a gradient for each eps.

ResNet-18 (CIFAR), batch 64. Only the adversarial images are computed, not their predictions. In theory, the time is
0.25 times that of the others.
"""

from __future__ import annotations

import numpy as np
import torch
from mmpretrain.models.backbones import ResNet_CIFAR
from torch import nn

from enc_plugin.functional import fgsm

from .harness import interleave, ratios
from .rivals import converted

EPS = [1 / 255, 2 / 255, 4 / 255, 8 / 255]
BATCH = 64


class Classifier(nn.Module):
    """ResNet-18 for 32 x 32 images in 0..1, with normalisation."""

    def __init__(self):
        super().__init__()
        self.backbone = ResNet_CIFAR(18)
        self.head = nn.Linear(512, 10)
        self.register_buffer("mean", torch.tensor([0.491, 0.482, 0.447])[:, None, None])
        self.register_buffer("std", torch.tensor([0.247, 0.243, 0.262])[:, None, None])

    def forward(self, images):
        (features,) = self.backbone((images - self.mean) / self.std)
        return self.head(features.mean((2, 3)))


def run(rounds: int = 5, batch: int = BATCH) -> dict:
    """Measure the time of the attack and the largest difference between the images."""
    import torchattacks
    from art.attacks.evasion import FastGradientMethod
    from art.estimators.classification import PyTorchClassifier

    torch.manual_seed(0)
    model = Classifier().eval()
    enc = converted(model, ("ENC ws",))["ENC ws"].eval()
    images, labels = torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    arrays = images.numpy(), labels.numpy()
    estimator = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), nb_classes=10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    theirs = [torchattacks.FGSM(model, eps=eps) for eps in EPS]
    art = [FastGradientMethod(estimator, eps=eps, batch_size=batch) for eps in EPS]
    candidates = {
        "enc_plugin": lambda: fgsm(model, images, labels, EPS),
        "torchattacks": lambda: [attack(images, labels) for attack in theirs],
        "art": lambda: [attack.generate(*arrays) for attack in art],
        "enc_plugin, ENC network": lambda: fgsm(enc, images, labels, EPS),
    }
    seconds = interleave(candidates, rounds=rounds)
    ours = candidates["enc_plugin"]()
    others = {name: candidates[name]() for name in ("torchattacks", "art")}
    return {
        "what": f"FGSM, {len(EPS)} eps, ResNet-18 (CIFAR), batch {batch}, float32",
        "unit": "seconds for all eps; ratio to the reference, round by round",
        "to_torchattacks": ratios(seconds, "torchattacks"),
        "to_art": ratios(seconds, "art"),
        "bound": {"ratio": 0.30, "floor": 1 / len(EPS)},
        "largest_difference": {
            name: max(
                (a - torch.as_tensor(np.asarray(b))).abs().max().item() for a, b in zip(ours, images_, strict=True)
            )
            for name, images_ in others.items()
        },
    }
