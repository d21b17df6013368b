"""Base class of hooks that measure the network with the weights of validation, such as averaged weights."""

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
    """Base class of hooks that measure the network with the weights of validation.

    Averaging hooks (mmengine's and mmpretrain's ``EMAHook``, and hooks of users) exchange the model's weights at the
    beginning and the end of a validation, each at its own priority. So measurements run at the end of the validation,
    before all other hooks. Without a validation at that point, a measurement runs before the next step or at the end of
    training, with the weights that ``EMAHook`` would use in a validation. The weights that a user's hook would use are
    unknown. In that case, this hook warns and skips the measurement; at the end of training, it measures the weights of
    the last validation, of which it keeps a copy.

    Subclasses define :meth:`due` and :meth:`measure`.
    """

    _advice = "keep one of them"  # if two hooks log under the same names

    def __init__(self) -> None:
        self._first = _FirstHook(self)
        self._pending: int | None = None  # step of the next measurement
        self._measured: int | None = None  # step of the last measurement
        self._trained = False
        self._training_weights: Tensor | None = None  # fingerprint
        self._unknown_average = False
        self._kept: tuple[int, list[Tensor]] | None = None  # step and weights of the last validation

    @property
    @abstractmethod
    def scalar_names(self) -> list[str]:
        """Names of the scalars that no other hook may log."""

    @abstractmethod
    def due(self, runner: Runner) -> int | None:
        """Step of a measurement to run at this validation, or None."""

    @abstractmethod
    def measure(self, runner: Runner, step: int, averaged: bool) -> None:
        """Measure the model with its present weights, and log the result.

        Args:
            runner: The run.
            step: Epoch or iteration for the log.
            averaged: Whether the weights differ from the weights in training.
        """

    def before_train(self, runner: Runner) -> None:
        """Raise if another hook logs the same names, and move before all other hooks."""
        for other in runner.hooks:
            double = set(self.scalar_names).intersection(getattr(other, "scalar_names", ()))
            if double and other is not self:
                raise ValueError(
                    f"custom_hooks: two hooks ({type(self).__name__}, {type(other).__name__}) would log under the same "
                    f"names ({', '.join(sorted(double))}); {self._advice}"
                )
        self._move_first(runner)

    def before_val(self, runner: Runner) -> None:
        """Move before hooks that were registered after training began."""
        self._move_first(runner)
        if self._training_weights is None:  # in runner.val() without training, the internal hook was not registered
            self._validation_begins(runner)

    def before_train_epoch(self, runner: Runner) -> None:
        """Run a pending measurement, because no validation followed."""
        self._before_training_continues(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Run a pending measurement, because no validation followed."""
        self._before_training_continues(runner)
        self._trained = True

    def after_train(self, runner: Runner) -> None:
        """Measure the final network unless that has been done; training may have stopped early."""
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
        """Number of finished iterations, or epochs if training counts epochs."""
        return runner.iter if isinstance(runner.train_loop, IterBasedTrainLoop) else runner.epoch

    def _move_first(self, runner: Runner) -> None:
        leading = itertools.takewhile(lambda hook: isinstance(hook, _FirstHook), runner.hooks)
        if self._first not in leading:
            # Assign a new list, because the runner may be iterating over the present one.
            runner._hooks = [self._first, *(hook for hook in runner.hooks if hook is not self._first)]

    def _validation_begins(self, runner: Runner) -> None:
        self._training_weights = fingerprint(unwrap(runner.model))

    def _validation_ends(self, runner: Runner) -> None:
        """Run the measurement of this validation, whose weights are still in the model."""
        model = unwrap(runner.model)
        averaged = self._training_weights is not None and not torch.equal(fingerprint(model), self._training_weights)
        self._unknown_average = averaged and not any(isinstance(hook, EMAHook) for hook in runner.hooks)
        if self._pending is None:
            self._pending = self.due(runner)
        if self._pending is not None:
            self._measure(runner, averaged)
        elif self._unknown_average:
            self._kept = self._now(runner), [tensor.detach().clone() for tensor in tensors(model)]

    def _before_training_continues(self, runner: Runner) -> None:
        if self._pending is not None:
            self._measure_outside(runner)
        self._kept = None
        if self._training_weights is not None:
            if not torch.equal(fingerprint(unwrap(runner.model)), self._training_weights):
                runner.logger.warning(
                    f"{type(self).__name__}: training continues with other weights than before the validation; hooks "
                    "that exchange weights must restore them in the reverse order (two averaging hooks do not)"
                )
            self._training_weights = None

    def _measure_outside(self, runner: Runner) -> None:
        """Run a pending measurement outside of a validation, with the weights that a validation would use."""
        if self._unknown_average:
            runner.logger.warning(
                f"{type(self).__name__}: not measured at {self._pending}, because a hook exchanges the weights for "
                "validation and there was no validation; use the same interval for validation and measurement"
            )
            self._pending = None
            return
        with as_validated(runner) as averaged:
            self._measure(runner, averaged)

    def _measure(self, runner: Runner, averaged: bool) -> None:
        step, self._pending = self._pending, None
        self._measured = step
        self.measure(runner, step, averaged)


class _FirstHook(Hook):
    """Informs its owner of validations before another hook exchanges the weights."""

    priority = "HIGHEST"

    def __init__(self, owner: ValidatedNetworkHook):
        self._owner = owner

    def before_val(self, runner: Runner) -> None:
        self._owner._validation_begins(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._owner._validation_ends(runner)
