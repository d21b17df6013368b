r"""Startup averages: running statistics of batch norms that are right from the first batch on.

The running statistics of a batch norm start at mean 0 and variance 1 and forget these values at the rate ``momentum``.
The outputs of layers with norm 1 have variances far below 1. So for about a hundred steps the running variance is too
large, a batch norm scales its input too little in eval mode, and these errors multiply over the layers. Validation
results are then wrong, although training, which does not use running statistics, is not affected. The remedy is a plain
average over the first batches, until the exponential average takes over.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.reparametrized import deep_copy


class _Norm(Protocol):
    """A norm layer with running statistics."""

    training: bool
    track_running_stats: bool
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    # Before an update: mean, variance, count, and whether these are the initial values of a new norm.
    _before_update: tuple[Tensor, Tensor, Tensor, Tensor] | None
    _forward_hooks: dict[int, Any]
    _forward_pre_hooks: dict[int, Any]
    _forward_hooks_always_called: dict[int, Any]

    def __call__(self, x: Tensor) -> Tensor: ...


_TRIAL_SHAPES = ((2, 2), (), (2,), (2, 2, 2))  # shapes of an input after (N, C)


def average_from_start(model: nn.Module) -> None:
    r"""Make the running statistics of all batch norms of ``model`` plain averages over their first updates.

    The n-th update of a batch norm then has the factor :math:`\max(\mathrm{momentum}, 1/n)`: the statistics are the
    mean over the n batches so far, and from ``n = 1 / momentum`` on they are updated as usual. n is
    ``num_batches_tracked``, so checkpoints contain it. The trained weights do not change by a single bit.

    Statistics that were loaded without ``num_batches_tracked``, or set in another way, get the weight of ``1 /
    momentum`` batches. Batch norms with ``momentum=None`` (a plain average already) or 0, without running statistics,
    or in eval mode do not change, nor do norms with another update rule than torch's, or in ensembles by ``vmap``.

    :func:`enc_plugin.to_enc` and ``ENCRunner`` call this for ENC networks.

    Args:
        model: Any ``nn.Module``. It and its batch norms get forward hooks, which remove themselves after ``1 /
            momentum`` steps, and a hook that renews them when a checkpoint is loaded. A second call has no effect.
    """
    watch = next((h for h in model._load_state_dict_post_hooks.values() if isinstance(h, _FirstSteps)), None)
    if watch is None:
        watch = _FirstSteps()
        model.register_load_state_dict_post_hook(watch)
    watch.start(model)


def drop_averages(model: nn.Module) -> None:
    """Remove the hooks of :func:`average_from_start` from ``model``; the statistics do not change."""
    for module in model.modules():
        for hooks in (module._load_state_dict_post_hooks, module._forward_pre_hooks, module._forward_hooks):
            _remove_hooks(module, hooks, (_FirstSteps, _Update))
        module.__dict__.pop("_before_update", None)


def unfit_statistics(model: nn.Module) -> dict[str, str]:
    """Names of norms whose running statistics do not fit the network yet, with the reason.

    The reason is that no batch was seen, or that the initial variance of 1 still contributes more than a tenth of the
    median variance. Synchronizes with the device.

    Args:
        model: Any ``nn.Module``. All modules with ``running_var`` and ``momentum`` are checked.
    """
    found = {}
    for name, norm in model.named_modules():
        var, mean, momentum = (getattr(norm, key, None) for key in ("running_var", "running_mean", "momentum"))
        if not (isinstance(var, Tensor) and isinstance(mean, Tensor) and isinstance(momentum, float)) or var.is_meta:
            continue
        count = getattr(norm, "num_batches_tracked", None)
        if var.eq(1).all() and not mean.any():
            found[name] = "no batch seen"
        elif count and not _is_averaged(norm) and (1 - momentum) ** int(count) > 0.1 * var.median():
            found[name] = f"{int(count)} batches seen, the initial variance still matters"
    return found


class _FirstSteps:
    """Hooks of a network that attach the hooks of its batch norms in its first steps and after a checkpoint is loaded.

    They attach in each step, because conversion to SyncBatchNorm replaces batch norms by new modules without hooks.
    """

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: nn.Module, incompatible_keys: Any) -> None:
        """Load hook: start again, because the checkpoint may be from the first steps."""
        self.start(model)

    def start(self, model: nn.Module) -> None:
        self.steps = 0
        _remove_hooks(model, model._forward_pre_hooks, _FirstSteps)
        model.register_forward_pre_hook(self.before)
        for module in model.modules():
            if _updates_as_torch(module):
                _attach(module)

    def before(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        if not model.training or torch.compiler.is_compiling():
            return
        norms = [norm for norm in model.modules() if _is_averaged(norm) or _is_stock(norm)]
        if self.steps < max((math.ceil(1 / norm.momentum) for norm in norms if norm.momentum), default=0):
            self.steps += 1
            for norm in norms:
                _attach(norm)
        else:
            _remove_hooks(model, model._forward_pre_hooks, _FirstSteps)


class _Update:
    """Hooks before and after the forward pass of one batch norm.

    Decisions that depend on the count are tensor operations, so the GPU is not synchronized. The number of calls is a
    Python integer. Compiled code does not count it, because it would be recompiled for each value; there the hooks stay
    attached, and do not change a bit after the first ``1 / momentum`` updates.
    """

    def __init__(self) -> None:
        self.calls = 0

    def before(self, norm: _Norm, args: Any) -> None:
        """Save the statistics; replace the initial variance 1 by 0, because rounding would lose small variances."""
        if not (norm.training and norm.track_running_stats and norm.momentum):
            return
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return  # vmap allows no .data, so ensembles keep torch's rule
        # .data, because autograd has saved the statistics and would raise if they changed, though it does not use them.
        mean, var, count = norm.running_mean.data, norm.running_var.data, norm.num_batches_tracked.data
        # Initial values are fresh whatever the count: a checkpoint of another number of classes brings nothing else.
        is_fresh = mean.eq(0).all() & var.eq(1).all()
        count.add_(((count == 0) & ~is_fresh) * math.ceil(1 / norm.momentum)).mul_(~is_fresh)
        norm._before_update = (mean.clone(), var.clone(), count.clone(), is_fresh)
        var.mul_(~is_fresh)

    def after(self, norm: _Norm, args: Any, out: Tensor | None) -> None:
        """Change the factor of the last update from ``momentum`` to ``max(momentum, 1 / n)``."""
        if norm._before_update is None:
            return
        (old_mean, old_var, old_count, is_fresh), norm._before_update = norm._before_update, None
        mean, var, count = norm.running_mean.data, norm.running_var.data, norm.num_batches_tracked.data
        ratio = count * norm.momentum
        is_average = ratio < 1
        kept = old_var * ~is_fresh
        new_mean = torch.where(is_average, old_mean + (mean - old_mean) / ratio, mean)
        new_var = torch.where(is_average, kept + (var - kept) / ratio, var)
        if out is None:  # the forward raised, before the update (bad input) or after it (end of a recomputation)
            was_updated = (var != kept).any()
            new_mean, new_var = torch.where(was_updated, new_mean, old_mean), torch.where(was_updated, new_var, old_var)
            count.copy_(torch.where(was_updated, count, old_count))
        mean.copy_(new_mean)
        var.copy_(new_var)
        if not torch.compiler.is_compiling():
            self.calls += 1
            if self.calls * norm.momentum >= 1:
                for hooks in (norm._forward_pre_hooks, norm._forward_hooks):
                    _remove_hooks(norm, hooks, _Update)


def _attach(norm: Any) -> None:
    if not any(_is_of(hook, _Update) for hook in norm._forward_hooks.values()):
        update = _Update()
        norm._before_update = None  # stored in the module, because DataParallel replicas share hooks
        norm.register_forward_pre_hook(update.before)
        # Always called, because activation checkpointing ends a recomputation by an exception in a forward pass.
        norm.register_forward_hook(update.after, always_call=True)


def _remove_hooks(module: Any, hooks: dict[int, Any], kinds: type | tuple[type, ...]) -> None:
    for key in [key for key, hook in hooks.items() if _is_of(hook, kinds)]:
        del hooks[key]
        module._forward_hooks_always_called.pop(key, None)


def _is_of(hook: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(hook, kinds) or isinstance(getattr(hook, "__self__", None), kinds)


def _is_averaged(module: nn.Module) -> TypeGuard[_Norm]:
    return "_before_update" in module.__dict__


def _is_stock(module: nn.Module) -> TypeGuard[_Norm]:
    """Whether torch's forward updates the module's statistics. Subclasses of SyncBatchNorm call it in theirs."""
    stock = isinstance(module, nn.SyncBatchNorm) or type(module).forward is _BatchNorm.forward
    return stock and _keeps_statistics(module)


def _keeps_statistics(module: nn.Module) -> TypeGuard[_Norm]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    is_kept = all(isinstance(module._buffers.get(name), Tensor) for name in names)
    return is_kept and isinstance(getattr(module, "momentum", None), float) and hasattr(module, "track_running_stats")


def _updates_as_torch(module: nn.Module) -> bool:
    """Whether the module updates its running statistics by torch's rule; other classes are tested on a copy.

    The rule is ``(1 - momentum) * old + momentum * batch``, with the unbiased variance and a count of batches.
    """
    if _is_averaged(module) or _is_stock(module):
        return True
    if not _keeps_statistics(module) or module.running_mean.ndim != 1:
        return False
    stock: Any = module
    trial = deep_copy(stock).to_empty(device="cpu").float().train()
    for hooks in (trial._forward_hooks, trial._forward_pre_hooks):
        hooks.clear()
    with torch.no_grad(), torch.random.fork_rng([]):
        for parameter in trial.parameters():
            parameter.fill_(1)
        return any(_follows_rule(trial, shape) for shape in _TRIAL_SHAPES)


def _follows_rule(norm: _Norm, shape: tuple[int, ...]) -> bool:
    channels, m = len(norm.running_mean), norm.momentum
    size = 6 * channels * math.prod(shape)
    x = torch.arange(size, dtype=torch.float32, device="cpu").sin().view(6, channels, *shape)
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(2.0)
    norm.num_batches_tracked.fill_(3)
    try:
        norm(x)
    except Exception:  # another shape may work
        return False
    over = [dim for dim in range(x.ndim) if dim != 1]
    mean, var = (1 - m) * 0.5 + m * x.mean(over), (1 - m) * 2.0 + m * x.var(over)
    followed = torch.allclose(norm.running_mean, mean) and torch.allclose(norm.running_var, var)
    return followed and int(norm.num_batches_tracked) == 4
