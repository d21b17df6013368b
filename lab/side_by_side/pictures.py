"""The pictures of data sets as tensors, decoded once for all runs."""

from __future__ import annotations

import json
from functools import cache

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.utils.data import Dataset

from enc_plugin.measuring.pipelines import find_pipeline


class Pictures(Dataset):
    """Packed samples without augmentation, in memory.

    Args:
        pixels: ``(N, C, H, W)``, uint8, in 0..255.
        labels: ``(N,)``, int64.
    """

    def __init__(self, pixels: Tensor, labels: Tensor):
        self.pixels, self.labels = pixels, labels
        self._samples = [DataSample().set_gt_label(label) for label in labels]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict:
        return {"inputs": self.pixels[index], "data_samples": self._samples[index]}

    @cache  # noqa: B019  (there are few data sets, and all stay until the end)
    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pixels and labels on a device, copied once."""
        return self.pixels.to(device), self.labels.to(device)


def load_pictures(cfg: Config) -> tuple[Pictures, Pictures]:
    """Training and validation pictures of a config, both without augmentation; equal data sets are read once."""
    pipeline = find_pipeline(cfg.val_dataloader.dataset)
    loaders = (cfg.train_dataloader, cfg.val_dataloader)
    return tuple(_read(json.dumps({**loader.dataset, "pipeline": pipeline}, sort_keys=True)) for loader in loaders)


@cache
def _read(settings: str) -> Pictures:
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        dataset = DATASETS.build(json.loads(settings))
    samples = [dataset[i] for i in range(len(dataset))]
    labels = torch.cat([sample["data_samples"].gt_label for sample in samples])
    return Pictures(torch.stack([sample["inputs"] for sample in samples]), labels)
