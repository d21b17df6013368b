"""Seeds data loading workers by epoch."""

from __future__ import annotations

from functools import partial

import torch
from mmengine.dataset import worker_init_fn
from mmengine.dist import get_world_size
from torch.utils.data import DataLoader, Dataset, get_worker_info


def seed_workers_by_epoch(loader: DataLoader, seed: int) -> None:
    """Let the workers of ``loader`` draw different augmentations in each epoch, and the same ones after a resume.

    mmengine seeds a worker with ``seed + num_workers * rank + worker`` when it starts. So workers that are started in
    each epoch draw the same augmentations in every epoch, and after a resume persistent workers draw those of the first
    epoch again. This function adds ``epoch * num_workers * ranks`` to the seed for both kinds of workers, so that the
    seeds of all epochs differ, and the draws of an epoch depend only on its number. The epoch is the argument of the
    sampler's ``set_epoch``. If the sampler has no such method, workers stay unchanged.

    Args:
        loader: Data loader of mmengine whose workers have not started; changed in place. A ``worker_init_fn`` of the
            config is kept.
        seed: Seed of the generator from which torch draws worker seeds (mmengine overrides those seeds later).
    """
    if loader.persistent_workers:
        # Each start of workers draws a number from torch's global generator, which mixup and dropout use too. A resumed
        # run starts persistent workers once more, and would then draw other numbers.
        loader.generator = torch.Generator().manual_seed(seed)
    # mmengine calls set_epoch of the sampler, or of the batch sampler's sampler.
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    sampler = next((sampler for sampler in samplers if hasattr(sampler, "set_epoch")), None)
    if sampler is None or getattr(loader.worker_init_fn, "func", None) is not worker_init_fn:
        return
    epoch = torch.zeros((), dtype=torch.int64).share_memory_()
    set_epoch = sampler.set_epoch

    def follow(number: int) -> None:
        epoch.fill_(number)
        set_epoch(number)

    sampler.set_epoch = follow
    loader.worker_init_fn = _WorkerSeeds(loader.worker_init_fn, epoch, loader.num_workers * get_world_size())


class _WorkerSeeds:
    """mmengine's ``worker_init_fn`` with a seed that grows by ``stride`` per epoch."""

    def __init__(self, init: partial, epoch: torch.Tensor, stride: int):
        self._init = init
        self._epoch = epoch  # in shared memory, so persistent workers see changes
        self._stride = stride
        self._seeded_for = None

    def __call__(self, worker: int) -> None:
        self._follow(worker)
        dataset = get_worker_info().dataset  # the copy of this worker
        dataset.__class__ = _followed(type(dataset), partial(self._follow, worker))

    def _follow(self, worker: int) -> None:
        """Seed again if the epoch has changed."""
        epoch = self._epoch.item()
        if epoch != self._seeded_for:
            self._seeded_for = epoch
            self._init(worker, seed=self._init.keywords["seed"] + epoch * self._stride)


def _followed(kind: type[Dataset], follow) -> type[Dataset]:
    """Subclass of ``kind`` that calls ``follow`` before it reads a sample."""

    def __getitem__(self, index):
        follow()
        return kind.__getitem__(self, index)

    return type(kind.__name__, (kind,), {"__getitem__": __getitem__, "__module__": kind.__module__})
