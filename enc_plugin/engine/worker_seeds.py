"""Seeds of data loading workers that depend on the epoch."""

from __future__ import annotations

from functools import partial

import torch
from mmengine.dataset import worker_init_fn
from mmengine.dist import get_world_size
from torch.utils.data import DataLoader, Dataset, get_worker_info


def seed_workers_by_epoch(loader: DataLoader, seed: int) -> None:
    """Let the workers of ``loader`` draw other augmentations in each epoch, and the same after a resume.

    mmengine seeds a worker with ``seed + num_workers * rank + worker`` when it starts. So workers that are started for
    each epoch repeat the same draws in every epoch, and after a resume ``persistent_workers`` begin again with the
    draws of the first epoch. Here epoch e adds ``e * num_workers * ranks`` for both kinds: the seeds of all epochs
    differ, epoch 0 has mmengine's, and the draws of an epoch depend on its number alone. The epoch is the number that
    the sampler gets (``set_epoch``); with a sampler that gets none, workers are left as they are.

    Args:
        loader: As mmengine builds it, its workers not yet started; changed in place. A ``worker_init_fn`` of the
            config's is left alone.
        seed: Seed of the generator from which torch draws worker seeds (mmengine overrides those seeds later).
    """
    if loader.persistent_workers:
        # torch draws one number each time that workers are started, from the generator that mixup and dropout use too:
        # a run that starts persistent workers once more would go on with other draws.
        loader.generator = torch.Generator().manual_seed(seed)
    # mmengine tells the epoch to the sampler, or to the one in the batch sampler.
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
    """``worker_init_fn``: mmengine's, with a seed that moves on by ``stride`` an epoch."""

    def __init__(self, init: partial, epoch: torch.Tensor, stride: int):
        self._init = init
        self._epoch = epoch  # in shared memory: persistent workers see it change
        self._stride = stride
        self._seeded_for = None

    def __call__(self, worker: int) -> None:
        self._follow(worker)
        dataset = get_worker_info().dataset  # this worker's own copy
        dataset.__class__ = _followed(type(dataset), partial(self._follow, worker))

    def _follow(self, worker: int) -> None:
        """Seed if the epoch is another one than last time."""
        epoch = self._epoch.item()
        if epoch != self._seeded_for:
            self._seeded_for = epoch
            self._init(worker, seed=self._init.keywords["seed"] + epoch * self._stride)


def _followed(kind: type[Dataset], follow) -> type[Dataset]:
    """``kind`` whose samples are drawn under the seed of the current epoch."""

    def __getitem__(self, index):
        follow()
        return kind.__getitem__(self, index)

    return type(kind.__name__, (kind,), {"__getitem__": __getitem__, "__module__": kind.__module__})
