"""Hook that measures the GBR on the same training samples through the whole run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner

from ..functional._checks import check_integer, check_seed, check_type
from .audit_hook import unwrap
from .gbr import FixedSamples, check_options, choose_samples, find_pipeline, measure_gbr
from .measure import statistics_note, untouched


@HOOKS.register_module()
class GBRHook(Hook):
    r"""Logs the Generalization Bound Regularizer (eq. 18) before training and while it goes on, and leaves no trace.

    Measured on the same training samples through the whole run, without training augmentation (test pipeline), in eval
    mode, on the weights that are being trained (``EMAHook``'s average is not looked at) and rank 0's batch norm
    statistics. The samples are chosen by ``seed`` and their indices stored in the work dir (``gbr_samples_*.json``),
    which a resumed run reads. They are kept in memory as the pipeline delivers them (150 kB a picture of 224 x 224).

    Logged for each measurement, to the visualizer's scalars, with the epoch (or iteration) as step:

    ======================  ============================================================================
    ``gbr/<output>``        mean of :math:`\lVert \partial f / \partial x \rVert_F^2`: logits or
                            probabilities squared, per unit of x squared (see ``space``)
    ``gbr/<output>_sem``    its standard error, over samples and probes
    ``gbr/seconds``         time that the measurement took
    ======================  ============================================================================

    Training with and without the hook gives the same weights, bit by bit; any number of processes logs the same values
    for the same weights. Every measurement uses the same probes, so that curves do not jitter. A value that is NaN or
    infinite is logged as such, with a warning.

    The defaults follow from ``bench/gbr.py``: with 512 samples, one projection adds less than 2 % of standard error
    (about as much as the choice of the samples) at a fifth of the time of ten classes; batches of 32 are as fast as
    larger ones.

    Args:
        num_samples: How many training samples; None: all. They cost a forward and ``projections`` (exact: number of
            classes) backward passes each.
        batch_size: Samples differentiated at a time, which bounds the memory; ranks share out whole batches.
        projections: Random orthonormal output directions for each sample (unbiased); None: exact.
        output: ``'logits'``, ``'probs'`` or ``'label_prob'`` (the paper's A_s(x)).
        space: What x is: ``'normalized'``, what the network receives, or ``'pixel'``, 0..255 before normalisation.
        interval: Measure every ``interval`` epochs (where training goes by iterations: iterations), and at the end.
        seed: Of the choice of samples and of the probes.
        by_epoch: Whether ``interval`` counts epochs or iterations; None: as the training loop does.
        pipeline: Transforms for the samples; None: those of the validation, else of the test dataloader.

    Raises:
        ValueError: If an option is out of range.
    """

    priority = "LOW"  # after SyncBuffersHook and parameter averaging, before CheckpointHook

    def __init__(
        self,
        num_samples: int | None = 512,
        batch_size: int = 32,
        projections: int | None = 1,
        output: str = "logits",
        space: str = "normalized",
        interval: int = 1,
        seed: int = 0,
        by_epoch: bool | None = None,
        pipeline: Sequence[dict] | None = None,
    ):
        check_options(output, projections, space, num_samples)
        check_integer("batch_size", batch_size, 1)
        check_integer("interval", interval, 1)
        check_seed("seed", seed)
        check_type("by_epoch", by_epoch, (bool, type(None)), "True, False or None")
        check_type("pipeline", pipeline, (list, tuple, type(None)), "a list of transforms or None")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.projections = projections
        self.output = output
        self.space = space
        self.interval = interval
        self.seed = seed
        self.by_epoch = by_epoch
        self.pipeline = pipeline
        self._samples: FixedSamples | None = None

    def before_train(self, runner: Runner) -> None:
        """Choose and read the samples; measure the weights that training starts from (not those of a resumed run)."""
        if self.by_epoch is None:
            self.by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        dataset = runner.train_dataloader.dataset
        indices = self._choose(runner, len(dataset))
        self._samples = FixedSamples(dataset, self._test_pipeline(runner), indices, self.batch_size)
        with untouched(unwrap(runner.model)):
            self._samples.read()
        if runner.iter == 0:
            self._measure(runner, 0)

    def after_train_epoch(self, runner: Runner) -> None:
        """Measure if ``interval`` counts epochs and this one is due."""
        if self.by_epoch and (self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)):
            self._measure(runner, runner.epoch + 1)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        """Measure if ``interval`` counts iterations and this one is due."""
        if not self.by_epoch and (self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner)):
            self._measure(runner, runner.iter + 1)

    def _measure(self, runner: Runner, step: int) -> None:
        found = measure_gbr(
            unwrap(runner.model),
            self._samples,
            output=self.output,
            projections=self.projections,
            space=self.space,
            seed=self.seed,
        )
        name = f"gbr/{self.output}"
        scalars = {name: found.mean, f"{name}_sem": found.sem, "gbr/seconds": found.seconds}
        # Not through the message hub: the log of every later validation would repeat its latest values.
        runner.visualizer.add_scalars(scalars, step=step, file_path=f"{runner.timestamp}.json")
        how = "exact" if self.projections is None else f"{self.projections} projection(s)"
        when = f"{'epoch' if self.by_epoch else 'iteration'} {step}"
        note = statistics_note(unwrap(runner.model))
        runner.logger.info(
            f"GBR: {found.mean:.5g} ± {found.sem:.2g} at {when} ({self.output} to {self.space} inputs, "
            f"{len(self._samples)} training samples, {how}, {found.seconds:.1f} s)" + (f"; {note}" if note else "")
        )
        if found.num_bad:
            runner.logger.warning(
                f"GBR: {found.num_bad} of {len(self._samples)} samples have a value that is NaN or infinite at {when}: "
                "the network has diverged, or its outputs overflow; training goes on"
            )

    def _choose(self, runner: Runner, length: int) -> list[int]:
        """The samples' indices, the same on all ranks: from the work dir if they are there, else chosen and stored."""
        settings = {"seed": self.seed, "num_samples": self.num_samples, "dataset_length": length}
        shared: list[list[int] | None] = [None]
        if is_main_process():
            path = Path(runner.work_dir, f"gbr_samples_{self.num_samples or 'all'}_seed{self.seed}.json")
            stored = json.loads(path.read_text()) if path.is_file() else {}
            if {key: stored.get(key) for key in settings} == settings:
                shared = [stored["indices"]]
            else:
                if stored:
                    runner.logger.warning(
                        f"GBR: {path} is of a dataset of {stored.get('dataset_length')} samples, this one has "
                        f"{length}; other samples are chosen, so that the curve does not go on from the earlier run's"
                    )
                shared = [choose_samples(length, self.num_samples, self.seed)]
                path.write_text(json.dumps({**settings, "indices": shared[0]}) + "\n")
        broadcast_object_list(shared)
        return shared[0]

    def _test_pipeline(self, runner: Runner) -> Sequence:
        if self.pipeline is not None:
            return self.pipeline
        # Loops that have not been built yet are configs: reading them builds nothing.
        for loader, loop in (
            (runner._val_dataloader, runner._val_loop),
            (runner._test_dataloader, runner._test_loop),
        ):
            loader = loop.dataloader if isinstance(loop, BaseLoop) else loader
            found = find_pipeline(loader["dataset"] if isinstance(loader, dict) else getattr(loader, "dataset", None))
            if found is not None:
                return found
        raise ValueError(
            "pipeline: GBRHook reads training samples with the pipeline of the validation or test dataloader, and this "
            "run has neither; set one of them, or GBRHook(pipeline=[...])"
        )
