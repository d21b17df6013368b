"""Hook that measures the accuracy under FGSM attacks during training."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner

from ..functional.attack import LEAST_EPS, other_unit
from ..functional.checks import check_integer
from ..measuring.robustness import ZERO_GRAD_LIMIT, check_dataset, check_pixel_eps, measure_robustness
from ..measuring.untouched import check_precision, untouched, unwrap
from .scalars import FigureGroup, Scalar, log_scalars, weights_in_words, write_measurements
from .validated_hook import ValidatedNetworkHook
from .watched import check_watched

_GROUP = FigureGroup(
    "Robustness (FGSM)",
    "FGSM attacks each validation image by one gradient step of size eps in pixel space; eps 0 means no attack.",
)
_EPS = "FGSM step eps (1/255 of the pixel range)"
_TITLE = "Accuracy under white-box FGSM, last measurement"


@HOOKS.register_module()
class FGSMHook(ValidatedNetworkHook):
    """Logs the accuracy on the validation set under a white-box attack (FGSM) after validation.

    The attack is untargeted, uses the true labels (:func:`enc_plugin.functional.fgsm`) and runs in float32. It changes
    pixels in 0..255 before the ``data_preprocessor`` normalises them, so eps does not depend on mean, std and channel
    order. The network has the weights of the validation (averaged ones if an averaging hook such as ``EMAHook`` is
    used, whatever its priority) and the batch norm statistics of rank 0, like the checkpoint. Samples that cannot be
    read are left out, with a warning.

    Each measurement logs these scalars to the visualizers and adds them to the validation metrics. So ``save_best`` can
    use them if every validation is followed by an attack:

    ====================  ==============================================================================
    ``fgsm/top1_clean``   accuracy without attack, percent
    ``fgsm/top1_eps<E>``  accuracy at eps E / 255 of the pixel range, percent
    ``fgsm/zero_grad``    share of samples, 0..1, whose gradient is zero at every pixel; above 0.01 the
                          attack overestimates the robustness (masked gradients)
    ``fgsm/averaged``     1 if averaged weights were attacked, 0 if the weights in training
    ``fgsm/seconds``      duration of the measurement in seconds
    ====================  ==============================================================================

    Training with and without the hook gives the same weights bit for bit, on a GPU with
    ``randomness=dict(deterministic=True)``. The logged accuracy does not depend on the number of processes. Each sample
    costs one gradient, and one forward pass for each eps. Attacks do not use TensorFloat-32.

    Args:
        eps: One or several step sizes in 1/255 of the pixel range: 8, not 8 / 255 (such small values cause a warning).
        interval: Number of epochs between two measurements; number of validations if training counts iterations. The
            end of training is always measured, even if it comes early.
        num_samples: Number of samples, the same ones each time, spread over the validation set; None: all.
        batch_size: Samples per batch; None: that of the validation dataloader.

    Raises:
        ValueError: If ``eps`` contains equal numbers, or numbers that are not in (0, 255]. Before training: if the
            validation pipeline does not give pixels in 0..255, or ``save_best`` uses a scalar of this hook and
            ``interval`` skips validations.
    """

    priority = "ABOVE_NORMAL"  # before CheckpointHook reads metrics
    scalars = (
        Scalar("fgsm/top1_clean", _TITLE, "top-1 accuracy (%)", _GROUP, against=_EPS, at=0.0, is_metric=True),
        Scalar(
            "fgsm/top1_eps<eps>",
            _TITLE,
            "top-1 accuracy (%)",
            _GROUP,
            column="FGSM <eps>/255 (%)",
            form=".2f",
            against=_EPS,
            is_metric=True,
        ),
        Scalar(
            "fgsm/zero_grad",
            "Samples without a gradient",
            "share, 0 to 1",
            is_metric=True,
            limit=ZERO_GRAD_LIMIT,
            beyond="More than 1 % of the images have an all-zero gradient, so FGSM overestimates the robustness; "
            "report PGD instead (tools/attack.py --pgd-steps).",
        ),
        Scalar("fgsm/averaged", "Whether averaged weights were attacked", is_metric=True, tells_weights=True),
        Scalar("fgsm/seconds", "Time of an attack", "seconds", is_metric=True, is_cost=True),
    )
    _advice = "use one hook with all eps"

    def __init__(
        self,
        eps: float | Sequence[float] = (1, 2, 4, 8),
        interval: int = 1,
        num_samples: int | None = None,
        batch_size: int | None = None,
    ):
        super().__init__()
        self.eps = check_pixel_eps(eps)
        check_integer("interval", interval, 1)
        check_integer("num_samples", num_samples, 1, none="all")
        check_integer("batch_size", batch_size, 1, none="that of the validation dataloader")
        self.interval = interval
        self.num_samples = num_samples
        self.batch_size = batch_size
        self._scalars: dict[str, float] = {}

    @property
    def scalar_names(self) -> list[str]:
        """Names of the logged scalars."""
        accuracies = ["top1_clean", *(f"top1_eps{eps:g}" for eps in self.eps)]
        return [f"fgsm/{name}" for name in [*accuracies, "zero_grad", "averaged", "seconds"]]

    def before_train(self, runner: Runner) -> None:
        """Check before the first epoch what would otherwise fail at the first validation."""
        if runner.val_loop is None:
            raise ValueError("FGSMHook needs a validation set: set val_dataloader, val_cfg and val_evaluator")
        super().before_train(runner)
        check_watched(runner)
        check_precision(unwrap(runner.model))
        for eps in self.eps:
            if eps < LEAST_EPS:
                runner.logger.warning(f"FGSMHook: eps: {other_unit(eps)}")
        dataset = runner.val_dataloader.dataset
        with untouched(unwrap(runner.model)):
            check_dataset(dataset, self.num_samples)
        share = "" if self.num_samples is None else f"{min(self.num_samples, len(dataset))} of "
        entry = {"weights": "validated", "samples": f"{share}{len(dataset)} validation samples"}
        write_measurements(runner, {name: entry | {"unit": "%"} for name in self.scalar_names if "top1" in name})

    def due(self, runner: Runner) -> int | None:
        """Step to log at after every ``interval``-th epoch or validation and after the last one, else None."""
        loop = runner._train_loop
        if not isinstance(loop, BaseLoop):  # in runner.val(); the property train_loop would build a loop
            return 0
        if isinstance(loop, IterBasedTrainLoop):
            counted, last = loop.iter // loop.val_interval, loop.iter >= loop.max_iters
        else:
            counted, last = loop.epoch, loop.epoch >= loop.max_epochs
        return self._now(runner) if counted % self.interval == 0 or last else None

    def measure(self, runner: Runner, step: int, averaged: bool) -> None:
        """Attack the model and log the result."""
        loader = runner.val_dataloader
        found = measure_robustness(
            unwrap(runner.model),
            loader.dataset,
            self.eps,
            num_samples=self.num_samples,
            batch_size=self.batch_size or loader.batch_size or 64,
            num_workers=loader.num_workers,
        )
        values = [found.clean, *found.fgsm.values(), found.zero_grad, float(averaged), found.seconds]
        self._scalars = dict(zip(self.scalar_names, values, strict=True))
        log_scalars(runner, self._scalars, step)
        under_attack = ", ".join(f"{accuracy:.2f} % at eps {eps:g}" for eps, accuracy in found.fgsm.items())
        runner.logger.info(
            f"FGSM: top-1 {found.clean:.2f} % clean, {under_attack} (1/255 of the pixel range; "
            f"{weights_in_words(averaged)}, {found.num_samples} validation samples, {found.zero_grad:.1%} without "
            f"gradient, {found.seconds:.1f} s)"
        )
        for warning in found.warnings:
            runner.logger.warning(f"FGSM: {warning}")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Add the scalars of this validation to ``metrics``."""
        if metrics is not None:
            metrics.update(self._scalars)
        self._scalars = {}
