"""Hook that sets the epsilon of every batch norm, to measure how much of ENC's effect is due to it."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm

from ..measuring.untouched import unwrap


@HOOKS.register_module()
class BatchNormEpsHook(Hook):
    """Sets ``eps`` of all batch norms before training, including those of ENC layers.

    A batch norm cancels the scale of the layer before it, up to its eps, which matters for ENC layers because weights
    of norm 1 give outputs with small variances. A tiny eps removes this effect. Checkpoints do not contain eps, so use
    the hook for testing too.

    Args:
        eps: Positive number that is added to the variance.

    Raises:
        ValueError: If ``eps`` is not positive.
    """

    def __init__(self, eps: float):
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps!r}; a constant channel would divide by zero")
        self.eps = eps

    def before_run(self, runner: Runner) -> None:
        """Set eps before training, validation or testing."""
        for module in unwrap(runner.model).modules():
            if isinstance(module, _BatchNorm):
                module.eps = self.eps
