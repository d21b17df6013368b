"""Which training samples a run measures, also after a resume, and by which pipeline they are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.runner import BaseLoop, Runner

from ..measuring.pipelines import find_pipeline
from ..measuring.samples import choose_samples


def stored_choice(runner: Runner, num_samples: int | None, seed: int) -> list[int]:
    """Indices of training samples, the same on all ranks: from the work dir if they are there, else chosen and stored.

    Args:
        runner: The run.
        num_samples, seed: As for :func:`enc_plugin.measuring.samples.choose_samples`.
    """
    dataset = runner.train_dataloader.dataset
    choose_samples(dataset, 1, seed)  # an error comes on all ranks, before one of them chooses
    length = len(dataset)
    settings = {"seed": seed, "num_samples": num_samples, "dataset_length": length}
    shared: list[list[int] | None] = [None]
    if is_main_process():
        path = Path(runner.work_dir, f"gbr_samples_{num_samples or 'all'}_seed{seed}.json")
        stored = json.loads(path.read_text()) if path.is_file() else {}
        if {key: stored.get(key) for key in settings} == settings:
            shared = [stored["indices"]]
        else:
            if stored:
                runner.logger.warning(
                    f"GBR: {path} is of a dataset of {stored.get('dataset_length')} samples, this one has {length}; "
                    "other samples are chosen, so that the curve does not go on from the earlier run's"
                )
            shared = [choose_samples(dataset, num_samples, seed)]
            path.write_text(json.dumps({**settings, "indices": shared[0]}) + "\n")
    broadcast_object_list(shared)
    return shared[0]


def validation_pipeline(runner: Runner) -> Sequence:
    """The pipeline of the run's validation dataloader, else of its test dataloader.

    Raises:
        ValueError: If it has neither.
    """
    # Loops that have not been built yet are configs: reading them builds nothing.
    for loader, loop in ((runner._val_dataloader, runner._val_loop), (runner._test_dataloader, runner._test_loop)):
        loader = loop.dataloader if isinstance(loop, BaseLoop) else loader
        found = find_pipeline(loader["dataset"] if isinstance(loader, dict) else getattr(loader, "dataset", None))
        if found is not None:
            return found
    raise ValueError(
        "pipeline: GBRHook reads training samples with the pipeline of the validation or test dataloader, and this run "
        "has neither; set one of them, or GBRHook(pipeline=[...])"
    )
