"""Hook that starts the projection of a run, and keeps averaged weights on the constraint set too."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..functional.retraction import retract_
from ..measuring.untouched import unwrap
from ..projection import add_projection
from ..steps.projected_groups import projected_groups
from ..surgery.projected import check_constrained, check_projectable, projected_layers
from .wrappers import optim_wrappers


@HOOKS.register_module()
class ENCProjectionHook(Hook):
    """Projects the weights of projected layers onto the constraint set before the first step.

    After each step, the optimizer itself projects them (:func:`enc_plugin.projection.add_projection`). A resumed run
    continues with its weights unchanged. An average of weights on the set is shorter than they are, so the hook
    projects the average that ``EMAHook`` keeps after each update. Before training, projected layers that no optimizer
    projects raise an error, and so does a layer that is pruned or parametrized later, when the next epoch starts.
    ``ENCRunner`` registers the hook. Without it, the first step projects the weights, and averages stay off the set. A
    network without projected layers is left alone.
    """

    priority = "LOW"  # after EMAHook has updated its average, before ENCAuditHook looks at the weights

    def before_train(self, runner: Runner) -> None:
        """Project the weights, which are initialised or loaded by now."""
        model, optimizers = unwrap(runner.model), [wrapper.optimizer for wrapper in optim_wrappers(runner)]
        check_constrained(model)
        held = {p for optimizer in optimizers for group in projected_groups(optimizer) for p in group["params"]}
        free = [x for x, layer in projected_layers(model) if layer.weight.requires_grad and layer.weight not in held]
        if free:
            raise ValueError(
                f"optim_wrapper: the model has enc=dict(how='project'), but no optimizer projects {len(free)} of its "
                f"layers ({free[0]!r}, ...); set constructor='ENCOptimWrapperConstructor' in optim_wrapper"
            )
        for optimizer in optimizers:
            if projected_groups(optimizer):
                add_projection(optimizer)
        # The average of a resumed run is on the set already, and has to stay as it is, bit by bit.
        if runner.iter == 0:
            self._retract_averages(runner)

    def before_train_epoch(self, runner: Runner) -> None:
        """Raise if a projected weight has been pruned or parametrized."""
        check_projectable(unwrap(runner.model))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Project the updated average."""
        self._retract_averages(runner)

    @torch.no_grad()
    def _retract_averages(self, runner: Runner) -> None:
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                # By setting, because weights that are projected together take fewer launches on a GPU.
                weights = defaultdict(list)
                for _, layer in projected_layers(unwrap(hook.ema_model)):
                    weights[layer.enc_variant, layer.enc_alpha].append(layer.weight)
                for (variant, alpha), group in weights.items():
                    retract_(group, variant, alpha)
