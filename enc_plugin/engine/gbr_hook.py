"""Hook that measures the GBR on fixed training samples during training."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from ..functional.checks import check_integer, check_seed, check_type
from ..measuring.gbr import check_options, input_unit, measure_gbr, pick_batch_size
from ..measuring.samples import FixedSamples
from ..measuring.untouched import statistics_note, untouched, unwrap
from ..table import first_few
from .run_samples import stored_choice, validation_pipeline
from .scalars import FigureGroup, Scalar, log_scalars, weights_in_words, write_measurements
from .validated_hook import ValidatedNetworkHook

_GROUP = FigureGroup(
    "Generalization bound regularizer (GBR)",
    "Mean squared Frobenius norm of the input-output Jacobian, over the same training samples in the whole run. The "
    "smaller it is, the less the output changes with the input. Weights are those of validation. Bands: 95 % bootstrap "
    "intervals of the mean. A few samples can dominate a mean, so the table also shows the median of exact values.",
)

_TAKEN = ("_sem", "_low", "_high", "_median", "seconds", "averaged")  # endings of the hook's other scalars


@HOOKS.register_module()
class GBRHook(ValidatedNetworkHook):
    r"""Logs the Generalization Bound Regularizer (eq. 18) on fixed training samples, before and during training.

    Each measurement uses the same training samples and the same random probes, so the curve changes only if the network
    changes. Samples are read without training augmentation: the training dataset loads the image, and the validation
    pipeline does the rest. The network is in eval mode, with the weights of validation (averaged ones if an averaging
    hook such as ``EMAHook`` is used, like the checkpoint's ``state_dict``) and the batch norm statistics of rank 0.

    The samples are chosen by ``seed``. No sample is used twice, even if the dataset repeats it. Their indices are
    stored in the work dir (``gbr_samples_*.json``), where a resumed run reads them. The processed images stay in memory
    (150 kB for 224 x 224). Samples that cannot be read are left out, with a warning.

    Each measurement logs, with the epoch (or iteration) as step:

    ======================  ============================================================================
    ``gbr/<name>``          mean of :math:`\lVert \partial f / \partial x \rVert_F^2`: logits or
                            probabilities squared, per unit of x squared (see ``space``)
    ``gbr/<name>_sem``      its standard error, over samples and probes
    ``gbr/<name>_low``      lower end of its 95 % bootstrap interval, over samples and probes
    ``gbr/<name>_high``     upper end
    ``gbr/<name>_median``   median over the samples, which is robust against heavy tails; only of exact
                            values (``projections=None`` or ``'label_prob'``), because noise lowers it
    ``gbr/averaged``        1 if averaged weights were measured, 0 if the weights in training
    ``gbr/seconds``         duration of the measurement in seconds (of a second hook: ``gbr/<name>_seconds``)
    ======================  ============================================================================

    ``measurements.json`` in the work dir states the weights, samples and unit of each scalar.

    Training with and without the hook gives the same weights bit for bit, on a GPU with
    ``randomness=dict(deterministic=True)``. The logged values do not depend on the number of processes. Measurements
    do not use TensorFloat-32. NaN and infinite values are logged too, with a warning.

    The defaults follow from ``lab/bench/gbr_cost.py``: with 512 samples, one projection adds a standard error of less
    than 2 % (about as much as the choice of the samples) and takes a fifth of the time of all ten classes. On a CPU,
    batches of 32 are as fast as larger ones.

    Args:
        num_samples: Number of training samples, at least 2; None: all. Each costs one forward pass and ``projections``
            (exact: number of classes) backward passes.
        batch_size: Samples that are differentiated together, which determines the memory. Each batch is computed by one
            process. None: 32, or the training batch size if that is larger and on a GPU. Batches that do not fit into
            the memory of a GPU are split.
        projections: Number of random orthonormal output directions for each sample (unbiased); None: exact.
        output: Function f that is differentiated: ``'logits'``, ``'probs'`` (the head's predictions, softmax or
            sigmoids) or ``'label_prob'`` (probability of the true class, the paper's A_s(x)).
        space: Input x: ``'normalized'`` (as the network receives it) or ``'pixel'`` (0..255, before normalisation).
        interval: Number of epochs (or iterations, see ``by_epoch``) between two measurements. The end of training is
            always measured, even if it comes early.
        seed: Seed for the choice of samples and for the probes.
        by_epoch: Whether ``interval`` counts epochs or iterations; None: like the training loop.
        pipeline: Transforms for the samples, including loading; None: loading as in the training dataset, then the
            pipeline of the validation or test dataloader.
        name: Name of the scalars, ``gbr/<name>``; None: ``output``. Two hooks with the same output need two names.

    Raises:
        ValueError: If an option is out of range. Before training: if another hook logs under the same names, pixels
            are not in 0..255 (``space='pixel'``), or the head predicts no probabilities (``output='probs'``).
    """

    priority = "LOW"  # after SyncBuffersHook
    scalars = (
        Scalar("gbr/averaged", "Whether averaged weights were measured", tells_weights=True),
        Scalar("gbr/seconds", "Time of a GBR measurement", "seconds", is_cost=True),
        Scalar("gbr/<name>_seconds", "Time of a GBR measurement", "seconds", is_cost=True),
        Scalar("gbr/<name>_sem", "Standard error of the GBR"),
        Scalar("gbr/<name>_low", "Lower end of the GBR's 95 % interval"),
        Scalar("gbr/<name>_high", "Upper end of the GBR's 95 % interval"),
        Scalar("gbr/<name>_median", "Median over the samples of the GBR", column="GBR <name>, median"),
        Scalar(
            "gbr/<name>",
            "GBR: <name>",
            "mean squared Jacobian norm",
            _GROUP,
            column="GBR <name>",
            log=True,
            error="gbr/<name>_sem",
            band=("gbr/<name>_low", "gbr/<name>_high"),
        ),
    )
    _advice = "give one of them a name, such as GBRHook(name='logits_pixel')"

    def __init__(
        self,
        num_samples: int | None = 512,
        batch_size: int | None = None,
        projections: int | None = 1,
        output: str = "logits",
        space: str = "normalized",
        interval: int = 1,
        seed: int = 0,
        by_epoch: bool | None = None,
        pipeline: Sequence[dict] | None = None,
        name: str | None = None,
    ):
        super().__init__()
        check_options(output, projections, space, num_samples)
        check_integer("batch_size", batch_size, 1, none="as the device suggests")
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
        check_type("name", name, (str, type(None)), "a word or None")
        if name is not None and (not re.fullmatch(r"[\w.-]+", name) or name.endswith(_TAKEN)):
            raise ValueError(
                f"name: expected a word such as 'logits_pixel' that does not end in {', '.join(_TAKEN)}, got {name!r}"
            )
        self.pipeline = pipeline
        self.name = name or output
        self._seconds = "gbr/seconds"
        self._samples: FixedSamples | None = None

    @property
    def scalar_names(self) -> list[str]:
        """Names of the scalars that no other hook may log."""
        return [f"gbr/{self.name}{end}" for end in ("", "_sem", "_low", "_high", "_median")]

    def before_train(self, runner: Runner) -> None:
        """Choose and read the samples, and measure the initial weights unless the run is resumed."""
        super().before_train(runner)
        by_iteration = isinstance(runner.train_loop, IterBasedTrainLoop)
        if self.by_epoch and by_iteration:
            raise ValueError("by_epoch: expected False or None, because this run counts iterations, got True")
        if self.by_epoch is None:
            self.by_epoch = not by_iteration
        if next(hook for hook in runner.hooks if isinstance(hook, GBRHook)) is not self:
            self._seconds = f"gbr/{self.name}_seconds"
        with untouched(unwrap(runner.model)):
            self._read_samples(runner)
        if runner.iter == 0:
            self.measure(runner, 0, averaged=False)  # EMAHook starts averaging at the first step
        elif self._is_due(runner) and (not self.by_epoch or runner.iter % len(runner.train_dataloader) == 0):
            # The run may have stopped between the checkpoint and the measurement.
            self._pending = self._now(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Note that a measurement is due if ``interval`` counts epochs."""
        if self.by_epoch and self._is_due(runner, ahead=1):
            self._pending = runner.epoch + 1

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        """Note that a measurement is due if ``interval`` counts iterations."""
        if not self.by_epoch and self._is_due(runner, ahead=1):
            self._pending = runner.iter + 1

    def due(self, runner: Runner) -> None:
        """None: only ``interval`` decides when to measure, not validations."""

    def measure(self, runner: Runner, step: int, averaged: bool) -> None:
        """Measure the GBR and log it."""
        found = measure_gbr(
            unwrap(runner.model),
            self._samples,
            output=self.output,
            projections=self.projections,
            space=self.space,
            seed=self.seed,
        )
        low, high = found.interval
        values = [found.mean, found.sem, low, high, found.median]
        scalars = {k: v for k, v in zip(self.scalar_names, values, strict=True) if v is not None}
        scalars |= {"gbr/averaged": float(averaged), self._seconds: found.seconds}
        log_scalars(runner, scalars, step)
        how = "exact" if self.projections is None else f"{self.projections} projection(s)"
        when = f"{'epoch' if self.by_epoch else 'iteration'} {step}"
        median = "" if found.median is None else f", median {found.median:.4g}"
        note = statistics_note(unwrap(runner.model))
        runner.logger.info(
            f"GBR: {found.mean:.5g} ({low:.4g} to {high:.4g}{median}) at {when} ({self.output} to {self.space} inputs, "
            f"{weights_in_words(averaged)}, {len(self._samples)} different training samples, {how}, "
            f"{found.seconds:.1f} s)" + (f"; {note}" if note else "")
        )
        if found.num_bad:
            runner.logger.warning(
                f"GBR: {found.num_bad} of {len(self._samples)} samples have a value that is NaN or infinite at {when}: "
                "the network has diverged, or its outputs overflow; training continues"
            )

    def _is_due(self, runner: Runner, ahead: int = 0) -> bool:
        done, last = (runner.epoch, runner.max_epochs) if self.by_epoch else (runner.iter, runner.max_iters)
        return (done + ahead) % self.interval == 0 or done + ahead == last

    def _now(self, runner: Runner) -> int:
        return runner.epoch if self.by_epoch else runner.iter

    def _read_samples(self, runner: Runner) -> None:
        """Choose, read and check the samples, and write ``measurements.json``."""
        dataset = runner.train_dataloader.dataset
        loads = self.pipeline is not None
        pipeline = self.pipeline if loads else validation_pipeline(runner)
        device = next(unwrap(runner.model).parameters()).device
        batch_size = self.batch_size or pick_batch_size(device, runner.train_dataloader.batch_size)
        chosen = stored_choice(runner, self.num_samples, self.seed)
        samples = FixedSamples(dataset, pipeline, chosen, batch_size, own_loading=not loads)
        if samples.left_out:
            runner.logger.warning(
                f"GBR: {len(samples.left_out)} of the chosen samples cannot be read and are left out, because the "
                f"dataset would replace them at random: {first_few([*map(str, samples.left_out)])}"
            )
        if self.space == "pixel":
            samples.check_pixels()
        self._samples = samples
        entry = {
            "weights": "validated",
            "samples": f"{len(samples)} of {len(dataset)} training samples",
            "unit": f"{self.output}² {input_unit(unwrap(runner.model), self.space)}",
        }
        write_measurements(runner, dict.fromkeys(self.scalar_names, entry))
