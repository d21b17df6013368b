"""How much weight decay acts in a run that a config describes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS, DefaultScope

from ..build import part_class
from ..functional import decay_efolds


def config_efolds(cfg: Config, iterations: int) -> float | None:
    r"""E-folds of :math:`\lVert W \rVert^2` by weight decay (:func:`enc_plugin.functional.decay_efolds`) over a run.

    They are those of a weight that decays by the optimizer's own ``weight_decay`` and ``lr``, without the factors of
    ``paramwise_cfg``.

    Args:
        cfg: Training config with ``optim_wrapper``, ``param_scheduler`` and ``train_cfg``.
        iterations: Optimizer steps an epoch.

    Returns:
        The e-folds; None where the optimizer is not SGD or AdamW, since decay that goes through Adam's moments has no
        rate of its own.
    """
    optimizer = dict(cfg.optim_wrapper.optimizer)
    kind = part_class(optimizer, OPTIMIZERS)
    if kind not in (torch.optim.SGD, torch.optim.AdamW):
        return None
    is_sgd = kind is torch.optim.SGD
    momentum = {key: optimizer.get(key, 0.0) for key in ("momentum", "dampening")} if is_sgd else {}
    decay = optimizer.get("weight_decay", 0.0 if is_sgd else 0.01)
    return decay_efolds(learning_rates(cfg, iterations), decay, **momentum)


def learning_rates(cfg: Config, iterations: int) -> Iterator[float]:
    """The learning rate of every step that mmengine's schedulers give, for a parameter without a factor.

    Args:
        cfg: As for :func:`config_efolds`.
        iterations: Steps an epoch.
    """
    by_epoch = cfg.train_cfg.get("by_epoch", True)
    steps = cfg.train_cfg.max_epochs * iterations if by_epoch else cfg.train_cfg.max_iters
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    configs = cfg.get("param_scheduler") or []
    schedulers = []
    with DefaultScope.overwrite_default_scope("mmengine"):
        for scheduler in [configs] if isinstance(configs, dict) else configs:
            scheduler = dict(scheduler)
            scheduler.setdefault("end", steps // iterations if scheduler.get("by_epoch", True) else steps)
            options = dict(optimizer=optimizer, epoch_length=iterations)
            schedulers.append(PARAM_SCHEDULERS.build(scheduler, default_args=options))
    optimizer.step()  # torch's schedulers, wrapped by mmengine's, want a step before their own
    for step in range(1, steps + 1):
        yield optimizer.param_groups[0]["lr"]
        for scheduler in schedulers:
            if not scheduler.by_epoch or step % iterations == 0:
                scheduler.step()
