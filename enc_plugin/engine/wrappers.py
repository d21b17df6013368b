"""Access to the optimizer wrappers and the schedulers of a run, of which there may be one set for each optimizer."""

from __future__ import annotations

from itertools import chain

from mmengine.optim import OptimWrapper, OptimWrapperDict, _ParamScheduler
from mmengine.runner import Runner


def optim_wrappers(runner: Runner) -> list[OptimWrapper]:
    """The optimizer wrapper of ``runner``, or those of its ``OptimWrapperDict``."""
    wrapper = runner.optim_wrapper
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def param_schedulers(runner: Runner) -> list[_ParamScheduler]:
    """The schedulers of ``runner``, which are built when its training loop begins, of all its optimizers."""
    schedulers = runner.param_schedulers or []
    return list(chain(*schedulers.values())) if isinstance(schedulers, dict) else list(schedulers)
