"""The optimizer wrappers of a run."""

from __future__ import annotations

from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner


def optim_wrappers(runner: Runner) -> list[OptimWrapper]:
    """The run's optimizer wrapper, or those of an ``OptimWrapperDict``."""
    wrapper = runner.optim_wrapper
    # An OptimWrapperDict is an OptimWrapper too.
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
