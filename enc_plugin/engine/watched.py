"""Checks that the metrics which ``save_best``, schedulers and early stopping monitor will be logged."""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from .scalars import declared
from .wrappers import param_schedulers


def watched_metrics(runner: Runner) -> Iterator[tuple[str, str]]:
    """(name, description of the setting) of each metric that is monitored after validations."""
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            yield from ((key, f"save_best={key!r} of CheckpointHook") for key in hook.save_best or [])
        elif isinstance(hook, EarlyStoppingHook):
            yield hook.monitor, f"monitor={hook.monitor!r} of EarlyStoppingHook"
    for scheduler in param_schedulers(runner):
        if getattr(scheduler, "need_val_args", False):
            yield scheduler.monitor, f"monitor={scheduler.monitor!r} of {type(scheduler).__name__}"


def check_watched(runner: Runner) -> None:
    """Raise ``ValueError`` if a monitored metric will not be among the metrics of each validation.

    Args:
        runner: Runner that is about to train, with its schedulers built.
    """
    measuring = {name: hook for hook in runner.hooks for name in getattr(hook, "scalar_names", ())}
    scalars = [scalar for hook in HOOKS.module_dict.values() for scalar in getattr(hook, "scalars", ())]
    for key, who in watched_metrics(runner):
        scalar = declared(scalars, key)
        if scalar is not None and not scalar.is_metric:
            raise ValueError(
                f"{who} would not be found, because it is logged, but is not a metric of the validation; use a metric "
                "of val_evaluator, such as 'accuracy/top1', or of FGSMHook, such as 'fgsm/top1_eps8'"
            )
        if key.startswith("fgsm/"):
            _check_attack(runner, key, who, measuring)


def _check_attack(runner: Runner, key: str, who: str, measuring: dict[str, Hook]) -> None:
    names = [name for name in measuring if name.startswith("fgsm/")]
    if key not in names:
        have = f"logs {', '.join(map(repr, names))}" if names else "is not among custom_hooks"
        raise ValueError(f"{who} would not be found, because FGSMHook {have}; use another metric")
    loop = runner.train_loop
    # Epochs between validations. If training counts iterations, the hook's interval counts validations.
    steps = [1] if isinstance(loop, IterBasedTrainLoop) else getattr(loop, "dynamic_intervals", [1])
    interval = measuring[key].interval
    if any(step % interval for step in steps):
        raise ValueError(
            f"interval: with {interval}, FGSMHook skips validations, but {who} needs its metric after each; set "
            "interval=1 (num_samples makes an attack cheaper), validate at the same interval, or use another metric"
        )
