"""The random numbers of a run's data, as mmengine's runner draws them without workers: order, augmentation, mixing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from mmengine.config import Config

_KNOWN = {
    "RandomCrop": {"crop_size", "padding"},
    "RandomFlip": {"prob", "direction"},
    "Cutout": {"shape", "pad_val", "prob"},
    "PackInputs": set(),
}
_MIXED = {"Mixup": {"alpha"}, "CutMix": {"alpha"}, "GaussianNoise": {"std"}}


@dataclass(frozen=True)
class Recipe:
    """How a config augments its training pictures.

    Attributes:
        size: Side of a picture, in pixels.
        padding: Black pixels around it before the crop.
        flip: Probability of a horizontal flip; None: no flip.
        cut: Side of the square that is cut out; None: none.
        fill: Pixel that fills the square.
        mixing: ``'Mixup'``, ``'CutMix'`` or ``'GaussianNoise'``, and its strength; None: none.
    """

    size: int
    padding: int
    flip: float | None = None
    cut: int | None = None
    fill: tuple[float, ...] = ()
    mixing: tuple[str, float] | None = None

    @classmethod
    def of(cls, cfg: Config) -> Recipe:
        """That of a config.

        Raises:
            ValueError: If it augments in a way that is not known here; names the transform.
        """
        steps = {}
        for step in cfg.train_dataloader.dataset.pipeline:
            kind = step["type"]
            if kind not in _KNOWN or set(step) - {"type"} != _KNOWN[kind]:
                raise ValueError(f"pipeline: expected {', '.join(_KNOWN)} with the study's options, got {dict(step)}")
            steps[kind] = step
        if list(steps) != [kind for kind in _KNOWN if kind in steps] or "RandomCrop" not in steps:
            raise ValueError(f"pipeline: expected RandomCrop first, then {', '.join(_KNOWN)} in this order")
        flip, cut = steps.get("RandomFlip"), steps.get("Cutout")
        if (flip and flip["direction"] != "horizontal") or (cut and cut["prob"] != 1.0):
            raise ValueError(f"pipeline: expected horizontal flips and Cutout of every picture, got {flip}, {cut}")
        mixing = (cfg.model.get("train_cfg") or {}).get("augments")
        if mixing is not None and set(mixing) - {"type"} != _MIXED.get(mixing["type"]):
            raise ValueError(f"augments: expected one of {', '.join(_MIXED)} with its strength, got {dict(mixing)}")
        return cls(
            size=steps["RandomCrop"]["crop_size"],
            padding=steps["RandomCrop"]["padding"],
            flip=flip and flip["prob"],
            cut=cut and cut["shape"],
            fill=tuple(cut["pad_val"]) if cut else (),
            mixing=mixing and (mixing["type"], *(value for key, value in mixing.items() if key != "type")),
        )


class Draws:
    """The numbers of each epoch, drawn once for all runs of equal seed and recipe.

    Args:
        seed: Of the run.
        recipe: How it augments.
        sizes: Pictures of each batch of an epoch.
        torch_state: State of torch's generator once the network has its initial weights.
        validated: Numbers of the epochs, counted from 1, that are followed by a validation.
    """

    def __init__(self, seed: int, recipe: Recipe, sizes: list[int], torch_state: torch.Tensor, validated: set[int]):
        self._seed, self._recipe, self._sizes, self._validated = seed, recipe, sizes, validated
        self._numpy = np.random.RandomState(seed)
        self._torch = torch.Generator()
        self._torch.set_state(torch_state)
        self._epochs: list[dict[str, np.ndarray]] = []

    def epoch(self, number: int) -> dict[str, np.ndarray]:
        """Numbers of epoch ``number``, counted from 0.

        Returns:
            ``order`` ``(N,)`` of the pictures; ``picture`` ``(N, 5)``: top and left of the crop, whether it is flipped,
            top and left of the cut square; with Mixup and CutMix ``share`` ``(batches, 2)`` of the own and of the other
            picture, ``partner`` ``(N,)`` within the batch, and ``box`` ``(batches, 4)``: top, bottom, left, right.
        """
        while number >= len(self._epochs):
            self._epochs.append(self._draw(len(self._epochs)))
        return self._epochs[number]

    def _draw(self, number: int) -> dict[str, np.ndarray]:
        self._loader_is_started()
        shuffled = torch.Generator().manual_seed(self._seed + number)
        numbers = {"order": [torch.randperm(sum(self._sizes), generator=shuffled).numpy()], "picture": []}
        for size in self._sizes:
            numbers["picture"].append(np.array([self._picture() for _ in range(size)], np.uint8))
            for name, value in self._mixing(size).items():
                numbers.setdefault(name, []).append(value)
        if number + 1 in self._validated:
            self._loader_is_started()
        return {name: np.concatenate(values) for name, values in numbers.items()}

    def _loader_is_started(self) -> None:
        """Each pass over a torch DataLoader draws a number for its workers, with or without workers."""
        torch.empty((), dtype=torch.int64).random_(generator=self._torch)

    def _picture(self) -> tuple[int, int, int, int, int]:
        """Augmentation of one picture; the draws of mmpretrain's transforms, in their order."""
        draw, recipe = self._numpy, self._recipe
        top, left = (draw.randint(0, 2 * recipe.padding + 1) for _ in range(2))
        flipped = recipe.flip is not None and draw.random_sample() < recipe.flip
        cut_top = cut_left = 0
        if recipe.cut is not None:
            draw.random_sample()  # whether to cut at all, which is certain
            middle = (draw.uniform(recipe.size) for _ in range(2))  # from 1 to the size
            cut_top, cut_left = (int(max(0, at - recipe.cut / 2)) for at in middle)
        return top, left, flipped, cut_top, cut_left

    def _mixing(self, size: int) -> dict[str, np.ndarray]:
        """How a batch is mixed with itself; the draws of mmpretrain's batch augmentations, in their order."""
        if self._recipe.mixing is None or self._recipe.mixing[0] == "GaussianNoise":
            return {}
        kind, alpha = self._recipe.mixing
        side, own = self._recipe.size, self._numpy.beta(alpha, alpha)
        partner = torch.randperm(size, generator=self._torch).numpy()
        box = np.zeros(4, np.int64)
        if kind == "CutMix":
            half = int(side * np.sqrt(1 - own)) // 2
            middle = np.array([self._numpy.randint(0, side) for _ in range(2)])
            low, high = np.clip(middle - half, 0, side), np.clip(middle + half, 0, side)
            own = 1.0 - np.prod(high - low) / float(side * side)
            box = np.stack([low, high], 1).flatten()
        return {"share": np.array([[own, 1 - own]], np.float32), "partner": partner, "box": box[None]}
