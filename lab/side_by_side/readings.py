"""What is measured of a run that trains side by side with others: the quantities of the study's results."""

from __future__ import annotations

import torch
from torch import nn

from enc_plugin.measuring.gbr import measure_gbr, pick_batch_size
from enc_plugin.measuring.pixels import preprocess
from enc_plugin.measuring.robustness import measure_robustness
from enc_plugin.measuring.samples import FixedSamples, choose_samples
from enc_plugin.measuring.untouched import untouched

from ..study.measures import measure
from .pictures import Pictures
from .training import Training

_ON_A_GPU = 1000  # images of a pass: small networks are a matter of launches


class Readings:
    """By-epoch and final measurements of one run, as its config's hooks and the study take them."""

    def __init__(self, training: Training):
        self.training = training
        self.by_epoch: dict[str, list] = {}
        self.seconds = {"gbr/seconds": 0.0, "fgsm/seconds": 0.0}
        cfg, device = training.cfg, training.device
        self._large = _ON_A_GPU if device.type == "cuda" else None
        self._gbr_hooks = [hook for hook in cfg.custom_hooks if hook["type"] == "GBRHook"]
        (self._fgsm,) = (hook for hook in cfg.custom_hooks if hook["type"] == "FGSMHook")
        batch = self._large or pick_batch_size(device, cfg.train_dataloader.batch_size)
        chosen = [choose_samples(len(training.train), h["num_samples"], h.get("seed", 0)) for h in self._gbr_hooks]
        self._samples = [FixedSamples(training.train, [], indices, batch) for indices in chosen]
        self._measure_gbr()

    def after_epoch(self, loss: float) -> None:
        """Note the epoch's mean loss; measure accuracy and GBR if they are due."""
        training = self.training
        self._note("loss", loss)
        if training.epoch in training.validated:
            with training.measured() as model:
                batch = self._large or training.cfg.val_dataloader.batch_size
                self._note("accuracy/top1", accuracy(model, training.test, batch))
        self._measure_gbr()

    def final(self) -> dict:
        """What a finished run is measured by."""
        training = self.training
        batch = self._large or training.cfg.val_dataloader.batch_size
        with training.measured() as model:
            options = {"num_samples": self._fgsm.get("num_samples"), "batch_size": batch}
            attacked = measure_robustness(model, training.test, self._fgsm["eps"], **options)
            self.seconds["fgsm/seconds"] = attacked.seconds
            rest = measure(model, training.train, training.test, training.run.cell.arena.pgd, self._large)
        last = {key: values[-1][1] for key, values in self.by_epoch.items()}
        return {
            "top1": last.pop("accuracy/top1"),
            "fgsm/top1_clean": attacked.clean,
            **{f"fgsm/top1_eps{eps:g}": top1 for eps, top1 in attacked.fgsm.items()},
            "fgsm/zero_grad": attacked.zero_grad,
            **{key: value for key, value in last.items() if key.startswith("gbr/")},
            **rest,
        }

    def _measure_gbr(self) -> None:
        epoch, epochs = self.training.epoch, self.training.epochs
        for hook, samples in zip(self._gbr_hooks, self._samples, strict=True):
            if epoch % hook.get("interval", 1) and epoch != epochs:
                continue
            with self.training.measured() as model:
                found = measure_gbr(model, samples, output=hook["output"], projections=hook["projections"])
            self.seconds["gbr/seconds"] += found.seconds
            self._note(f"gbr/{hook['output']}", found.mean)
            self._note(f"gbr/{hook['output']}_sem", found.sem)

    def _note(self, key: str, value: float) -> None:
        self.by_epoch.setdefault(key, []).append([self.training.epoch, value])


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Pictures, batch: int) -> float:
    """Top-1 accuracy in percent."""
    pixels, labels = pictures.on(next(model.parameters()).device)
    with untouched(model):
        parts = zip(pixels.split(batch), labels.split(batch), strict=True)
        hits = [(model(preprocess(model, x), mode="tensor").argmax(1) == y).sum() for x, y in parts]
    return 100 * torch.stack(hits).sum().item() / len(labels)
