"""Checks before training: unsupported settings raise, costly ones warn."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from mmengine.device import get_device
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.batchnorm import _BatchNorm

from ..build import part_class
from ..installation import usable_cores
from ..layers import RefusesRescaledRows
from ..measuring.untouched import recomputed
from .wrappers import param_schedulers


def refuse_sharding(model_wrapper: type | nn.Module | None) -> None:
    """Raise ``ValueError`` for a wrapper that shards parameters, because ENC needs whole rows of weights.

    Args:
        model_wrapper: Class of a model wrapper, or a model that may be wrapped.
    """
    if isinstance(model_wrapper, nn.Module):
        sharded = any(isinstance(module, FullyShardedDataParallel) for module in model_wrapper.modules())
    else:
        sharded = model_wrapper is not None and issubclass(model_wrapper, FullyShardedDataParallel)
    if sharded:
        raise ValueError(
            "model_wrapper: FullyShardedDataParallel splits the weights among the processes, but the shift of the "
            "decay, the audit and the measurements need whole rows; use DDP: leave model_wrapper_cfg out, with "
            "runner_type='ENCRunner' (with FlexibleRunner: strategy=dict(type='DDPStrategy'))"
        )


def refuse_strategy(strategy: Mapping | str | None) -> None:
    """Raise ``ValueError`` for a config with a ``strategy``, which mmengine's Runner would ignore silently."""
    if strategy is not None:
        name = strategy.get("type") if isinstance(strategy, Mapping) else strategy
        raise ValueError(
            f"strategy: {name!r} is for mmengine's FlexibleRunner, this runner would ignore it; leave it out "
            "(several processes train with DDP), or set runner_type='FlexibleRunner' (not with FSDPStrategy, which "
            "splits the rows that ENC normalises)"
        )


def refuse_merged_norms(names: Sequence[str] | str | None, model: nn.Module) -> None:
    """Raise ``ValueError`` if mmengine's option ``efficient_conv_bn_eval`` concerns layers that normalise their weight.

    It computes convolutions from the free weights and merges batch norms into them.

    Args:
        names: The option: names of submodules, or None.
        model: The model, not wrapped.
    """
    for name in [names] if isinstance(names, str) else names or ():
        layer = next((m for m in model.get_submodule(name).modules() if isinstance(m, RefusesRescaledRows)), None)
        if layer is not None:
            raise ValueError(
                f"efficient_conv_bn_eval: {name!r} has layers such as {type(layer).__name__}, but the option computes "
                "with their free weights; leave it out, or use it on the stock network that tools/fold.py makes of an "
                "ENC network"
            )


def check_decay_schedules(runner: Runner) -> None:
    """Raise ``ValueError`` if a scheduler gives weight decay to parameters that do not decay, such as biases.

    A schedule of ``weight_decay`` that ends at ``eta_min`` takes the decay of all groups there, also from 0.

    Args:
        runner: Runner that is about to train, with its schedulers built.
    """
    for scheduler in param_schedulers(runner):
        end = getattr(scheduler, "eta_min", None)
        if getattr(scheduler, "param_name", None) != "weight_decay" or not end:
            continue
        groups = zip(scheduler.optimizer.param_groups, scheduler.base_values, strict=True)
        exempt = sum(len(group["params"]) for group, start in groups if start == 0)
        if exempt:
            raise ValueError(
                f"param_scheduler: {type(scheduler).__name__} takes the weight decay of all parameters to "
                f"eta_min={end:g}, also of {exempt} tensors that do not decay (biases, ...); give the end as a share "
                "of each decay (eta_min_ratio of CosineAnnealingParamScheduler, end_factor of LinearParamScheduler)"
            )


def check_distributed(sync_bn: str | None, model_wrapper_cfg: Mapping | None, model: nn.Module) -> None:
    """Raise ``ValueError`` if ``model`` cannot be trained by several processes with these settings.

    Args:
        sync_bn: Option of mmengine's config: ``'torch'``, ``'mmcv'`` or None.
        model_wrapper_cfg: Config of the model wrapper, or None for DDP.
        model: The model, not wrapped.

    Raises:
        ValueError: If synchronised batch norm is not available, or parameters would be sharded.
    """
    if model_wrapper_cfg is not None and "type" in model_wrapper_cfg:
        refuse_sharding(part_class(model_wrapper_cfg, MODEL_WRAPPERS))
    if get_device() == "cpu":
        layers = [name for name, module in model.named_modules() if type(module).__name__ == "SyncBatchNorm"]
        if sync_bn is not None or layers:
            where = (
                f"sync_bn: {sync_bn!r}" if sync_bn is not None else f"norm_cfg: layer {layers[0]!r} is SyncBN, which"
            )
            raise ValueError(
                f"{where} needs GPUs (both torch's synchronised batch norm and mmcv's), and these processes run on the "
                "CPU; leave it out: each process then normalises with its own batch, so make "
                "train_dataloader.batch_size large enough (above about 16)"
            )
    if sync_bn == "mmcv" and importlib.util.find_spec("mmcv._ext") is None:
        raise ValueError(
            "sync_bn: 'mmcv' needs the compiled operators of full mmcv, and this is mmcv-lite; use sync_bn='torch'"
        )


def tell_many_workers(runner: Runner) -> None:
    """Log one line if a data loader has more workers than this process has cores.

    torch warns of it for every loader and again in every epoch; the tools turn that off.
    """
    loops = {"train": runner.train_loop, "val": runner.val_loop}
    workers = {name: getattr(getattr(loop, "dataloader", None), "num_workers", 0) for name, loop in loops.items()}
    cores = usable_cores()
    many = [f"{name}_dataloader {number}" for name, number in workers.items() if number > cores]
    if many:
        runner.logger.info(
            f"ENC: more data workers than cores ({cores}): {', '.join(many)}; num_workers={cores} may load as fast and "
            "needs less memory"
        )


def warn_of_recomputation(runner: Runner, model: nn.Module) -> None:
    """Log a warning if activation checkpointing will update batch norm statistics twice a step."""
    names = recomputed(model)
    modules = dict(model.named_modules())
    norms = {m for name in names for m in modules[name].modules() if isinstance(m, _BatchNorm) and m.momentum}
    if not norms:
        return
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    momentum = max(norm.momentum for norm in norms)
    runner.logger.warning(
        f"ENC: activation checkpointing runs the forward pass of {names[0] or 'the model'!r}{more} twice a step, which "
        f"updates the running statistics of {len(norms)} batch norms twice. This does not change the weights, but the "
        f"validation; with norm_cfg=dict(type='BN', momentum={1 - (1 - momentum) ** 0.5:.4g}) there, two updates equal "
        f"one with {momentum:g}"
    )
