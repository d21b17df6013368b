"""Hook that begins the projection of a run, and keeps averaged weights on the constraint set, too."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..functional.retraction import retract_
from ..measuring.untouched import unwrap
from ..projection import add_projection
from ..surgery.projected import projected_layers
from .wrappers import optim_wrappers


@HOOKS.register_module()
class ENCProjectionHook(Hook):
    """Takes the weights of layers that are ENC by projection to the constraint set before the first step.

    After each step, the optimizer itself holds them (:func:`enc_plugin.projection.add_projection`); a resumed run goes
    on with its weights as they are. An average of weights on the set is shorter than they are, so the average that
    ``EMAHook`` keeps is taken back to the set after each update. ``ENCRunner`` registers the hook; without it the first
    step takes the weights to the set, and averages stay off it. A network without such layers is left alone.
    """

    priority = "LOW"  # after EMAHook has updated its average, before ENCAuditHook looks at the weights

    def before_train(self, runner: Runner) -> None:
        """Take the weights to the set, initialised or loaded as they are now."""
        for wrapper in optim_wrappers(runner):
            add_projection(wrapper.optimizer)
        if runner.iter == 0:  # a resumed run has its average on the set, and goes on with it bit by bit
            self._retract_averages(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Take the updated average back to the set."""
        self._retract_averages(runner)

    @torch.no_grad()
    def _retract_averages(self, runner: Runner) -> None:
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                for _, layer in projected_layers(unwrap(hook.ema_model)):
                    retract_([layer.weight], layer.enc_variant, layer.enc_alpha)
