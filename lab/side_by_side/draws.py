"""The random numbers of a run's data, as mmengine's runner draws them without workers: order, augmentation, mixing."""

from __future__ import annotations

import numpy as np
import torch

from .recipe import Recipe


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
            numbers["picture"].append(self._pictures(size))
            for name, value in self._mixing(size).items():
                numbers.setdefault(name, []).append(value)
        if number + 1 in self._validated:
            self._loader_is_started()
        return {name: np.concatenate(values) for name, values in numbers.items()}

    def _loader_is_started(self) -> None:
        """Each pass over a torch DataLoader draws a number for its workers, with or without workers."""
        torch.empty((), dtype=torch.int64).random_(generator=self._torch)

    def _pictures(self, count: int) -> np.ndarray:
        """Augmentation of a batch: the draws of mmpretrain's transforms in their order, read off NumPy's random words.

        A call of NumPy for each number would take half a second an epoch, in which a GPU waits.
        """
        recipe, last = self._recipe, 2 * self._recipe.padding
        reals = (recipe.flip is not None) + 3 * (recipe.cut is not None)
        before = self._numpy.get_state()
        words = self._numpy.randint(0, 2**32, (8 + 2 * reals) * count + 64, dtype=np.uint32)
        # An integer from 0 to ``last`` is the lowest bits of the first word in which they are not larger.
        lowest = words & (2 ** last.bit_length() - 1)
        fitting = np.where(lowest <= last, np.arange(len(words)), len(words))
        following = np.minimum.accumulate(fitting[::-1])[::-1].tolist()
        tops, lefts, at = [], [], 0
        for _ in range(count):
            tops.append(following[at])
            lefts.append(following[tops[-1] + 1])
            at = lefts[-1] + 1 + 2 * reals
        self._numpy.set_state(before)
        self._numpy.randint(0, 2**32, at, dtype=np.uint32)  # leaves the generator behind the words that were used

        def real(number: int) -> np.ndarray:
            """Real number ``number`` of each picture, uniform in [0, 1)."""
            high, low = (words[np.array(lefts) + 1 + 2 * number + i] for i in range(2))
            return ((high >> 5) * 2.0**26 + (low >> 6)) / 2.0**53

        flipped = np.zeros(count) if recipe.flip is None else real(0) < recipe.flip
        corner = np.zeros((2, count))
        if recipe.cut is not None:  # the first of three numbers says whether to cut at all, which is certain
            middle = np.stack([recipe.size + (1 - recipe.size) * real(reals - n) for n in (2, 1)])
            corner = np.maximum(0, middle - recipe.cut / 2)
        return np.stack([lowest[tops], lowest[lefts], flipped, *corner], 1).astype(np.uint8)

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
