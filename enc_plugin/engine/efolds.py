"""How much weight decay acts in a run, computed from a config or summed over the optimizer's steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS, DefaultScope
from torch import Tensor

from ..build import part_class
from ..functional import decay_efolds
from .preflight import check_schedules

_COUNTED = (torch.optim.SGD, torch.optim.AdamW)
_SETTINGS = ("lr", "weight_decay", "momentum", "dampening")  # on which the e-folds of a step depend


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
    kind = part_class(cfg.optim_wrapper.optimizer, OPTIMIZERS)
    if kind not in _COUNTED:
        return None
    # Steps are counted by their settings, because a run has millions of steps, and often only a few settings.
    steps = Counter(tuple(map(group.get, _SETTINGS)) for group in scheduled_settings(cfg, iterations))
    total = 0.0
    for values, count in steps.items():
        settings = {name: value for name, value in zip(_SETTINGS, values, strict=True) if value is not None}
        total += count * decay_efolds([settings["lr"]], **_decay_settings(kind, settings))
    return total


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


def scheduled_settings(cfg: Config, iterations: int) -> Iterator[dict[str, Any]]:
    """Settings of the optimizer in each step (its parameter group) under mmengine's schedulers of any of them.

    Args:
        cfg: As for :func:`config_efolds`. Its optimizer is one of torch.
        iterations: Steps per epoch.
    """
    loop = cfg.train_cfg
    steps = loop.max_epochs * iterations if loop.get("max_epochs") else loop.max_iters
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = OPTIMIZERS.build(dict(cfg.optim_wrapper.optimizer), default_args=dict(params=parameters))
    (group,) = optimizer.param_groups
    scaling = cfg.get("auto_scale_lr") or {}
    if scaling.get("enable"):  # mmengine scales before it builds the schedulers
        group["lr"] *= cfg.train_dataloader.batch_size / scaling["base_batch_size"]
    configs = cfg.get("param_scheduler") or []
    epochs = loop.get("max_epochs") or 1  # as mmengine counts those of runs by iterations
    check_schedules(configs, {"epochs": epochs, "iters": steps})
    schedulers = []
    with DefaultScope.overwrite_default_scope("mmengine"):
        for scheduler in [configs] if isinstance(configs, dict) else configs:
            scheduler = dict(scheduler)
            scheduler.setdefault("end", epochs if scheduler.get("by_epoch", True) else steps)
            built_for = dict(optimizer=optimizer, epoch_length=iterations)
            schedulers.append(PARAM_SCHEDULERS.build(scheduler, default_args=built_for))
    optimizer.step()  # torch's schedulers warn if the optimizer has not stepped before them
    for step in range(1, steps + 1):
        yield group
        for scheduler in schedulers:
            if not scheduler.by_epoch or step % iterations == 0:
                scheduler.step()
