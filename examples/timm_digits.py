"""A plain PyTorch loop over a timm network: ENC, the shifted decay, and the GBR of the training images.

``python examples/timm_digits.py`` trains on scikit-learn's handwritten digits, under a minute on one core, and without
mmengine's Runner.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import enc_plugin
from enc_plugin.functional import gbr
from enc_plugin.timm import add_shift, param_groups_enc


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Digits as images ``(N, 1, 32, 32)`` of zero mean and unit variance; every fifth one is for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate((images - images.mean()) / images.std(), size=32, mode="bilinear")
    labels = torch.tensor(digits.target)
    test = torch.arange(len(labels)) % 5 == 4
    return TensorDataset(images[~test], labels[~test]), TensorDataset(images[test], labels[test])


def main(epochs: int = 5, variant: str = "ws", weight_decay: float = 1e-4) -> dict[str, float]:
    """Train, print a line each epoch, and return the last epoch's accuracy and GBR.

    Args:
        epochs: Passes over the 1,438 training images.
        variant: ``'fro'``, ``'wn'``, ``'ws'`` or ``'centered_fro'``, as for :func:`enc_plugin.to_enc`.
        weight_decay: Factor lambda of the epsilon-shifted decay.
    """
    torch.manual_seed(0)
    train_set, test_set = load_data()

    # By name from timm's registry. Any other network: model = timm.create_model(...); enc_plugin.to_enc(model)
    model = timm.create_model(
        "enc_resnet18", num_classes=10, in_chans=1, channels=(16, 32, 64, 128), enc=dict(variant=variant)
    )
    print(f"largest relative deviation of a squared norm from alpha: {enc_plugin.audit(model).max_deviation:.1e}")

    # Biases do not decay. With add_shift, the decay pulls ENC weights towards a small norm instead of towards zero.
    optimizer = torch.optim.SGD(param_groups_enc(model, weight_decay, shift_eps=1e-3), lr=0.1, momentum=0.9)
    add_shift(optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    result = {}
    for epoch in range(1, epochs + 1):
        model.train()
        for images, labels in DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()

        model.eval()
        with torch.no_grad():
            hits = sum((model(images).argmax(1) == labels).sum().item() for images, labels in DataLoader(test_set, 128))
        # The exact GBR (eq. 18) of the same 64 training images every time, with the standard error of its mean.
        values = gbr(model, train_set.tensors[0][:64])
        result = {"accuracy": 100 * hits / len(test_set), "gbr": values.mean().item()}
        sem = values.std().item() / len(values) ** 0.5
        print(f"epoch {epoch}: accuracy {result['accuracy']:.1f} %, GBR {result['gbr']:.3g} +- {sem:.1g}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5, help="passes over the data (default: %(default)s)")
    parser.add_argument("--variant", default="ws", help="'fro', 'wn', 'ws' or 'centered_fro' (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="lambda (default: %(default)s)")
    main(**vars(parser.parse_args()))
