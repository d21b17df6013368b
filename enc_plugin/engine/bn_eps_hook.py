"""Hook that sets the epsilon of every batch norm: a control for what ENC does to networks through it."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm

from ..measuring.untouched import unwrap


@HOOKS.register_module()
class BatchNormEpsHook(Hook):
    """Sets ``eps`` of all batch norms before training, those that ENC layers own included.

    Under eq. 20 and 21 a batch norm undoes alpha, except for its eps, which matters because outputs of weights of norm
    1 have small variances. A tiny eps shows the network without this effect. Checkpoints do not hold the value, so set
    it again to test.

    Args:
        eps: Added to the variance, in its unit; positive.

    Raises:
        ValueError: If ``eps`` is not positive.
    """

    def __init__(self, eps: float):
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps!r}; a constant channel would divide by zero")
        self.eps = eps

    def before_run(self, runner: Runner) -> None:
        """Set it before training, validation or testing."""
        for module in unwrap(runner.model).modules():
            if isinstance(module, _BatchNorm):
                module.eps = self.eps
