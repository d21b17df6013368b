"""Base of hooks that measure the network that validation sees, whatever other hooks do with the weights."""

from __future__ import annotations

import itertools
from abc import abstractmethod

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor

from ..measuring.untouched import unwrap
from .exchanged import as_validated, fingerprint, holding, tensors


class ValidatedNetworkHook(Hook):
    """Base of hooks that measure the network that validation sees, and log it under names of their own.

    Averaging hooks (mmengine's and mmpretrain's ``EMAHook``, and hooks of users) put other weights into the model when
    a validation begins and take them away when it ends, each at its own priority. A measurement that is due runs while
    the weights of the validation are in place: at the end of the validation, ahead of all other hooks. If there is no
    validation at that point, it runs before the next step or at the end of training, with the weights that ``EMAHook``
    would have put in. The weights that a user's hook would have put in are not known then, so nothing is measured, with
    a warning; at the end of training the weights of the last validation are measured, which are kept for that.

    Subclasses say what is due (:meth:`due`) and measure (:meth:`measure`).
    """

    def __init__(self) -> None:
        self._ahead = _AheadOfAll(self)
        self._pending: int | None = None  # step of the measurement that is due
        self._measured: int | None = None  # step of the last measurement
        self._trained = False
        self._training_weights: Tensor | None = None  # fingerprint
        self._unknown_average = False
        self._kept: tuple[int, list[Tensor]] | None = None  # step and weights of the last validation

    @property
    @abstractmethod
    def scalar_names(self) -> list[str]:
        """Names under which the hook logs, each of one quantity."""

    @abstractmethod
    def due(self, runner: Runner) -> int | None:
        """Step of a measurement that is due at this validation, or None."""

    @abstractmethod
    def measure(self, runner: Runner, step: int, averaged: bool) -> None:
        """Measure the weights that are in the model, and log them under ``step``.

        Args:
            runner: The run.
            step: Epoch or iteration to log under.
            averaged: Whether these are not the weights in training.
        """

    def before_train(self, runner: Runner) -> None:
        """Refuse names that another hook logs under, and go ahead of all hooks."""
        for other in runner.hooks:
            double = set(self.scalar_names) & set(getattr(other, "scalar_names", [])) if other is not self else None
            if double:
                kind = type(self).__name__
                raise ValueError(
                    f"custom_hooks: two hooks ({kind}, {type(other).__name__}) would log under the same names "
                    f"({', '.join(sorted(double))}), as one curve; {self._way_out}"
                )
        self._go_ahead(runner)

    _way_out = "keep one of them"

    def before_val(self, runner: Runner) -> None:
        """See to it that no hook that has been registered since comes first."""
        self._go_ahead(runner)
        if self._training_weights is None:  # a validation without training: nothing went ahead so far
            self._validation_begins(runner)

    def before_train_epoch(self, runner: Runner) -> None:
        """Measure what is due and has not been validated."""
        self._before_training_goes_on(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Measure what is due and has not been validated."""
        self._before_training_goes_on(runner)
        self._trained = True

    def after_train(self, runner: Runner) -> None:
        """Measure the network that training ends with, if that has not been done: it may have stopped early."""
        step = self._now(runner)
        if self._pending is None and self._trained and self._measured != step:
            self._pending = step
        if self._pending is None:
            return
        if self._kept is not None and self._kept[0] == self._pending:
            with holding(unwrap(runner.model), self._kept[1]):
                self._measure(runner, averaged=True)
        else:
            self._measure_outside(runner)
        self._kept = None

    def _now(self, runner: Runner) -> int:
        """The step that has been trained up to."""
        return runner.iter if isinstance(runner.train_loop, IterBasedTrainLoop) else runner.epoch

    def _go_ahead(self, runner: Runner) -> None:
        leading = itertools.takewhile(lambda hook: isinstance(hook, _AheadOfAll), runner.hooks)
        if self._ahead not in leading:
            # A new list: the present one may be in the middle of being called.
            runner._hooks = [self._ahead, *(hook for hook in runner.hooks if hook is not self._ahead)]

    def _validation_begins(self, runner: Runner) -> None:
        self._training_weights = fingerprint(unwrap(runner.model))

    def _validation_ends(self, runner: Runner) -> None:
        """Measure what is due; the weights that were validated are in place."""
        model = unwrap(runner.model)
        averaged = self._training_weights is not None and not torch.equal(fingerprint(model), self._training_weights)
        self._unknown_average = averaged and not any(isinstance(hook, EMAHook) for hook in runner.hooks)
        if self._pending is None:
            self._pending = self.due(runner)
        if self._pending is not None:
            self._measure(runner, averaged)
        elif self._unknown_average:
            self._kept = self._now(runner), [tensor.detach().clone() for tensor in tensors(model)]

    def _before_training_goes_on(self, runner: Runner) -> None:
        if self._pending is not None:
            self._measure_outside(runner)
        self._kept = None
        if self._training_weights is not None:
            if not torch.equal(fingerprint(unwrap(runner.model)), self._training_weights):
                runner.logger.warning(
                    f"{type(self).__name__}: training goes on with other weights than before the validation; hooks "
                    "that exchange weights for it must give them back in the reverse order (two averaging hooks do not)"
                )
            self._training_weights = None

    def _measure_outside(self, runner: Runner) -> None:
        """Measure what is due where no validation is: with the weights that one would see."""
        if self._unknown_average:
            runner.logger.warning(
                f"{type(self).__name__}: not measured at {self._pending}, because a hook exchanges the weights for "
                "validation and there was no validation; validate where it is to be measured"
            )
            self._pending = None
            return
        with as_validated(runner) as averaged:
            self._measure(runner, averaged)

    def _measure(self, runner: Runner, averaged: bool) -> None:
        step, self._pending = self._pending, None
        self._measured = step
        self.measure(runner, step, averaged)


class _AheadOfAll(Hook):
    """Tells its owner of validations before another hook can exchange the weights."""

    priority = "HIGHEST"

    def __init__(self, owner: ValidatedNetworkHook):
        self._owner = owner

    def before_val(self, runner: Runner) -> None:
        self._owner._validation_begins(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._owner._validation_ends(runner)
