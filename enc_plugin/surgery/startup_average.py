r"""Running statistics that fit from the first batch on: a plain average, until the exponential one takes over.

A batch norm starts at mean 0 and variance 1 and forgets them at the rate ``momentum``. The outputs of layers of norm 1
have variances far below 1, so what is left of the 1 makes a batch norm scale far too little in eval mode, and the
factors of all layers multiply: for about a hundred steps, the network that is validated is not the one that trains.
Training itself never reads running statistics.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Norm(Protocol):
    """What a norm has that keeps running statistics."""

    training: bool
    track_running_stats: bool
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    # Statistics ahead of an update: mean, variance, count, and whether they are those of a new norm.
    _before_update: tuple[Tensor, Tensor, Tensor, Tensor] | None
    _forward_hooks: dict[int, Any]
    _forward_pre_hooks: dict[int, Any]
    _forward_hooks_always_called: dict[int, Any]

    def __call__(self, x: Tensor) -> Tensor: ...


_TRIAL_SHAPES = ((2, 2), (), (2,), (2, 2, 2))  # of an input, behind (N, C)


def average_from_start(model: nn.Module) -> None:
    r"""Let the running statistics of all batch norms of ``model`` be plain averages over their first updates.

    The n-th update of a batch norm then has the factor :math:`\max(\mathrm{momentum}, 1/n)`: the statistics are the
    mean over the n batches so far, and from ``n = 1 / momentum`` on stock batch norm goes on from there. n is
    ``num_batches_tracked``, so that checkpoints carry it. Weights train as without it, bit for bit.

    Statistics that were loaded without their count, or filled in by other means, weigh as much as a whole average.
    Left alone are batch norms with ``momentum=None`` (a plain average by itself) or 0, without running statistics, or
    in eval mode, and norms that update their statistics in another way than torch's.

    :func:`enc_plugin.to_enc` and ``ENCRunner`` call this for ENC networks.

    Args:
        model: Any ``nn.Module``. It and its batch norms get forward hooks for the first ``1 / momentum`` steps, and it
            gets a hook that renews them when a checkpoint is loaded. Calling this again changes nothing.
    """
    watch = next((h for h in model._load_state_dict_post_hooks.values() if isinstance(h, _FirstSteps)), None)
    if watch is None:
        watch = _FirstSteps()
        model.register_load_state_dict_post_hook(watch)
    watch.start(model)


def drop_averages(model: nn.Module) -> None:
    """Take off all that :func:`average_from_start` has put on ``model``; the statistics stay as they are."""
    for module in model.modules():
        for hooks in (module._load_state_dict_post_hooks, module._forward_pre_hooks, module._forward_hooks):
            _remove_hooks(module, hooks, (_FirstSteps, _Update))
        module.__dict__.pop("_before_update", None)


def unfit_statistics(model: nn.Module) -> dict[str, str]:
    """Norms whose running statistics do not fit the network yet, with the reason; waits for the device.

    Args:
        model: Any ``nn.Module``. Norms of any class are looked at that have ``running_var`` and ``momentum``.

    Returns:
        Reasons by name: no batch has been seen, or the 1 of the start makes up more than a tenth of the variances.
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
            found[name] = f"{int(count)} batches seen, the initial variance is still felt"
    return found


class _FirstSteps:
    """Hooks of a network: keep those of its batch norms on for its first steps, and renew them when it is loaded.

    In each step anew, because conversion to synchronised batch norm puts new modules without hooks in the place.
    """

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: nn.Module, incompatible_keys: Any) -> None:
        """As the load hook: the checkpoint may be of the first steps."""
        self.start(model)

    def start(self, model: nn.Module) -> None:
        self.steps = 0
        _remove_hooks(model, model._forward_pre_hooks, _FirstSteps)
        model.register_forward_pre_hook(self.before)
        for module in model.modules():
            if _updates_as_torch(module):
                _attach(module)

    def before(self, model: nn.Module, args: Any) -> None:
        """As the forward pre-hook."""
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
    """Hooks of one batch norm, around its forward pass.

    What depends on the count is decided by tensors, which may be on a GPU. Only the calls are a Python number, which
    compiled code leaves alone: it would be compiled anew for each. There the hooks stay, and change no bit after the
    first ``1 / momentum`` updates.
    """

    def __init__(self) -> None:
        self.calls = 0

    def before(self, norm: _Norm, args: Any) -> None:
        """Note the statistics, with zeros for the initial 1: small variances would drown in its rounding."""
        if not (norm.training and norm.track_running_stats and norm.momentum):
            return
        # .data: autograd has saved the statistics (without using them), and would object to a change.
        mean, var, count = norm.running_mean.data, norm.running_var.data, norm.num_batches_tracked.data
        is_new = count == 0
        is_fresh = is_new & mean.eq(0).all() & var.eq(1).all()
        count.add_((is_new & ~is_fresh) * math.ceil(1 / norm.momentum))
        norm._before_update = (mean.clone(), var.clone(), count.clone(), is_fresh)
        var.mul_(~is_fresh)

    def after(self, norm: _Norm, args: Any, out: Tensor | None) -> None:
        """Give the update that was made with the factor ``momentum`` the factor ``max(momentum, 1 / n)``."""
        if norm._before_update is None:
            return
        (old_mean, old_var, old_count, is_fresh), norm._before_update = norm._before_update, None
        mean, var, count = norm.running_mean.data, norm.running_var.data, norm.num_batches_tracked.data
        ratio = count * norm.momentum
        is_average = ratio < 1
        kept = old_var * ~is_fresh
        new_mean = torch.where(is_average, old_mean + (mean - old_mean) / ratio, mean)
        new_var = torch.where(is_average, kept + (var - kept) / ratio, var)
        if out is None:  # an error, which may have come before the update (a bad input) or after (recomputation's end)
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
        norm._before_update = None  # of the module, because replicas (DataParallel) share its hooks
        norm.register_forward_pre_hook(update.before)
        # After errors, too: activation checkpointing ends a recomputation by one, within a forward pass.
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
    """Whether torch updates the module's statistics: subclasses of SyncBatchNorm add to what its forward does."""
    stock = isinstance(module, nn.SyncBatchNorm) or type(module).forward is _BatchNorm.forward
    return stock and _keeps_statistics(module)


def _keeps_statistics(module: nn.Module) -> TypeGuard[_Norm]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    is_kept = all(isinstance(module._buffers.get(name), Tensor) for name in names)
    return is_kept and isinstance(getattr(module, "momentum", None), float) and hasattr(module, "track_running_stats")


def _updates_as_torch(module: nn.Module) -> bool:
    """Whether the module updates running statistics by torch's rule; of classes that are not torch's, a copy is tried.

    The rule: ``(1 - momentum) * old + momentum * batch``, with the unbiased variance, and one more batch counted.
    """
    if _is_averaged(module) or _is_stock(module):
        return True
    if not _keeps_statistics(module) or module.running_mean.ndim != 1:
        return False
    stock: Any = module
    trial = copy.deepcopy(stock).to_empty(device="cpu").float().train()
    for hooks in (trial._forward_hooks, trial._forward_pre_hooks):
        hooks.clear()
    with torch.no_grad(), torch.random.fork_rng([]):
        for parameter in trial.parameters():
            parameter.fill_(1)
        return any(_follows_rule(trial, shape) for shape in _TRIAL_SHAPES)


def _follows_rule(norm: _Norm, shape: tuple[int, ...]) -> bool:
    channels, m = len(norm.running_mean), norm.momentum
    x = torch.arange(6.0 * channels * math.prod(shape)).sin().view(6, channels, *shape)
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(2.0)
    norm.num_batches_tracked.fill_(3)
    try:
        norm(x)
    except Exception:  # an input of another shape may do
        return False
    over = [dim for dim in range(x.ndim) if dim != 1]
    mean, var = (1 - m) * 0.5 + m * x.mean(over), (1 - m) * 2.0 + m * x.var(over)
    followed = torch.allclose(norm.running_mean, mean) and torch.allclose(norm.running_var, var)
    return followed and int(norm.num_batches_tracked) == 4
