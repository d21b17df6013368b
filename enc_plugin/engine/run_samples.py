"""Chooses the training samples that a run measures, and the pipeline that reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.runner import BaseLoop, Runner

from ..checkpoint_files import replacing
from ..measuring.pipelines import find_pipeline
from ..measuring.samples import choose_samples


def stored_choice(runner: Runner, num_samples: int | None, seed: int) -> list[int]:
    """Indices of training samples, equal on all ranks; stored in the work dir, where a resumed run reads them.

    Args:
        runner: The run.
        num_samples, seed: As for :func:`enc_plugin.measuring.samples.choose_samples`.
    """
    dataset = runner.train_dataloader.dataset
    choose_samples(dataset, 1, seed)  # so that errors are raised on all ranks, although only one chooses
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
                    f"GBR: {path} is for a dataset of {stored.get('dataset_length')} samples, this one has {length}; "
                    "new samples are chosen, so the curve does not continue that of the earlier run"
                )
            shared = [choose_samples(dataset, num_samples, seed)]
            with replacing(path) as partial:
                partial.write_text(json.dumps({**settings, "indices": shared[0]}) + "\n")
    broadcast_object_list(shared)
    return shared[0]


def validation_pipeline(runner: Runner) -> Sequence:
    """Pipeline of the validation dataloader, or of the test dataloader if there is none.

    Raises:
        ValueError: If the run has neither.
    """
    # The private attributes are configs until the loops are built; the properties would build them.
    for loader, loop in ((runner._val_dataloader, runner._val_loop), (runner._test_dataloader, runner._test_loop)):
        loader = loop.dataloader if isinstance(loop, BaseLoop) else loader
        found = find_pipeline(loader["dataset"] if isinstance(loader, dict) else getattr(loader, "dataset", None))
        if found is not None:
            return found
    raise ValueError(
        "pipeline: GBRHook reads training samples with the pipeline of the validation or test dataloader, and this run "
        "has neither; set one of them, or GBRHook(pipeline=[...])"
    )
