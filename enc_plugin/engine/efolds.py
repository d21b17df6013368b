"""How much weight decay acts in a run, computed from a config or summed over the optimizer's steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS, DefaultScope
from torch import Tensor

from ..build import part_class
from ..functional import decay_efolds

_COUNTED = (torch.optim.SGD, torch.optim.AdamW)


def config_efolds(cfg: Config, iterations: int) -> float | None:
    r"""E-folds of :math:`\lVert W \rVert^2` by weight decay (:func:`enc_plugin.functional.decay_efolds`) over a run.

    They hold for weights with the optimizer's ``weight_decay`` and ``lr``, without factors of ``paramwise_cfg``.

    Args:
        cfg: Training config with ``optim_wrapper``, ``param_scheduler`` and ``train_cfg``.
        iterations: Optimizer steps per epoch.

    Returns:
        The e-folds; None unless the optimizer is SGD or AdamW, because decay that passes through Adam's moments has no
        fixed rate.
    """
    optimizer = dict(cfg.optim_wrapper.optimizer)
    kind = part_class(optimizer, OPTIMIZERS)
    if kind not in _COUNTED:
        return None
    defaults = {"weight_decay": 0.0 if kind is torch.optim.SGD else 0.01}
    return decay_efolds(learning_rates(cfg, iterations), **_decay_settings(kind, defaults | optimizer))


class DecayTally:
    """Sums the e-folds of weight decay over optimizer steps, with the learning rate and decay of each step.

    The e-folds are those of :func:`enc_plugin.functional.decay_efolds`, for each parameter group. Steps of a group
    without gradients do not count. A learning rate that is a tensor is summed on its device, so no step waits for it.

    Args:
        optimizers: Optimizers whose steps are counted from now on; those other than SGD and AdamW are ignored.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]):
        self._sums: dict[torch.optim.Optimizer, list[float | Tensor]] = {}
        for optimizer in optimizers:
            if isinstance(optimizer, _COUNTED):
                self._sums[optimizer] = [0.0] * len(optimizer.param_groups)
                optimizer.register_step_post_hook(self._add)

    def _add(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        sums = self._sums[optimizer]
        for i, group in enumerate(optimizer.param_groups):
            if any(p.grad is not None for p in group["params"]):
                lr = group["lr"].double() if isinstance(group["lr"], Tensor) else group["lr"]
                sums[i] = sums[i] + decay_efolds([lr], **_decay_settings(type(optimizer), group))

    def of(self, weight: Tensor) -> float | None:
        """E-folds of a weight, 0 if it is frozen; None if it is in none of the counted optimizers."""
        for optimizer, sums in self._sums.items():
            for group, total in zip(optimizer.param_groups, sums, strict=True):
                if any(p is weight for p in group["params"]):
                    return float(total) if weight.requires_grad else 0.0
        return None

    def state(self) -> list[list[float]]:
        """Sums of each optimizer's groups, for a checkpoint."""
        return [[float(total) for total in sums] for sums in self._sums.values()]

    def load(self, state: list[list[float]]) -> bool:
        """Continue from what :meth:`state` returned; return False and start at 0 if the groups differ."""
        same = [len(sums) for sums in state] == [len(sums) for sums in self._sums.values()]
        if same:
            self._sums = {optimizer: [*sums] for optimizer, sums in zip(self._sums, state, strict=True)}
        return same


def _decay_settings(kind: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> dict[str, float]:
    """Arguments of ``decay_efolds`` from a group; no momentum for AdamW, because its decay bypasses the moments."""
    if group.get("enc_projection"):  # norms are held
        return {"weight_decay": 0.0}
    names = ("weight_decay", "momentum", "dampening") if issubclass(kind, torch.optim.SGD) else ("weight_decay",)
    return {name: group[name] for name in names if name in group}


def learning_rates(cfg: Config, iterations: int) -> Iterator[float]:
    """Learning rate of each step under mmengine's schedulers, without factors of ``paramwise_cfg``.

    Args:
        cfg: As for :func:`config_efolds`.
        iterations: Steps per epoch.
    """
    loop = cfg.train_cfg
    steps = loop.max_epochs * iterations if loop.get("max_epochs") else loop.max_iters
    lr = cfg.optim_wrapper.optimizer.get("lr", 1e-3)  # the default of SGD and AdamW
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    configs = cfg.get("param_scheduler") or []
    schedulers = []
    with DefaultScope.overwrite_default_scope("mmengine"):
        for scheduler in [configs] if isinstance(configs, dict) else configs:
            scheduler = dict(scheduler)
            scheduler.setdefault("end", steps // iterations if scheduler.get("by_epoch", True) else steps)
            options = dict(optimizer=optimizer, epoch_length=iterations)
            schedulers.append(PARAM_SCHEDULERS.build(scheduler, default_args=options))
    optimizer.step()  # torch's schedulers warn if the optimizer has not stepped before them
    for step in range(1, steps + 1):
        yield optimizer.param_groups[0]["lr"]
        for scheduler in schedulers:
            if not scheduler.by_epoch or step % iterations == 0:
                scheduler.step()
