"""Applies the epsilon-shifted decay in the steps of any torch optimizer.

Importing this module registers a step hook for all optimizers of the process. It acts only on parameter groups with the
keys ``enc_variant`` and ``shift_eps``, which copies and state dicts of optimizers keep.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .functional.checks import check_type
from .layers import living_layers
from .steps.carried_hooks import carry_load_hook, register_carried_hook
from .steps.decay_kinds import decay_kind
from .steps.running_step import (
    Decays,
    RunningStep,
    calling_frame,
    inner_optimizers,
    move_pre_hook_last,
    register_first_post_hook,
    replace_decay,
    restore_decays,
    start_momentum,
)
from .steps.shifted_decay import AROUND, GRADIENT, WEIGHT, WHOLE, Offsets, restore, shift_group, takes_decay
from .steps.shifted_groups import check_group, keep_shift, shifted_groups


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def add_shift(optimizer: Optimizer, decoupled: bool | None = None, *, warn: Callable[[str], None] = _warn) -> None:
    """Check that ``optimizer`` can apply the epsilon shift of its groups.

    This call is optional: every optimizer applies the shift once per step to each group with ``enc_variant`` and
    ``shift_eps``. The call reports problems before the first step, makes the groups keep their shift when a state dict
    with a different one is loaded, and sets ``decoupled``. Repeated calls change nothing.

    The shift is applied after all other step pre-hooks, hence after unscaling and clipping. It is applied once per
    step, however many backward passes were accumulated, and not in steps that a gradient scaler skips. If ``step``
    gets a closure, the shift is applied after each call of the closure. It can be a part of ``grad`` after the step, so
    clear gradients before the next one.

    Args:
        optimizer: Any torch optimizer whose groups hold ``lr`` and ``weight_decay``. If it wraps another optimizer
            (look-ahead, SAM, ZeRO), the inner one applies the shift.
        decoupled: Whether its weight decay shrinks the weights themselves, as in AdamW, instead of being added to the
            gradient. Also holds for groups that are added later. None: determined by trial steps, or False with a
            warning if these fail.
        warn: Called with the text of each warning.

    Warns of ENC weights that decay in groups without a shift, of groups whose decay kind is unknown, and of optimizers
    without a decay of their own.

    Raises:
        TypeError: If ``optimizer`` is not a torch optimizer, or ``decoupled`` is neither a bool nor None.
        ValueError: If a group with ``shift_eps`` lacks a setting, or the optimizer runs no step hooks.

    Example:
        >>> import enc_plugin
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> _ = enc_plugin.to_enc(model)
        >>> groups = enc_plugin.param_groups_enc(model, weight_decay=1e-4)
        >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        >>> add_shift(optimizer)
    """
    check_type("optimizer", optimizer, Optimizer, "a torch optimizer")
    check_type("decoupled", decoupled, (bool, type(None)), "True, False or None")
    for group in optimizer.param_groups:
        check_group(group)
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, Optimizer):
            add_shift(inner, decoupled, warn=warn)
    own = shifted_groups(optimizer)
    if not own and any("shift_eps" in group for group in optimizer.param_groups):
        return
    warn_of_plain_decay(optimizer, warn)
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # torch's constructor did not run
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} runs no step hooks, so its groups cannot be shifted; call "
            "torch.optim.Optimizer.__init__ in its constructor"
        )
    if decoupled is not None:
        optimizer.defaults["enc_decoupled"] = decoupled  # copied into groups that are added later
        for _, group in own:
            group["enc_decoupled"] = decoupled
    shift = _shift_of(optimizer)
    shift.warn = warn
    for index, group in own:
        shift.kind(optimizer, index, group)  # warns if the optimizer is unknown


def warn_of_plain_decay(optimizer: Optimizer, warn: Callable[[str], None] = _warn) -> None:
    """Warn if ``optimizer`` decays weights of ENC layers in groups without a shift; once, when such groups decay."""
    if optimizer in _asked:
        return
    plain = [g for g in optimizer.param_groups if g.get("weight_decay") and "enc_variant" not in g]
    if not plain:  # a schedule may begin at a decay of 0
        return
    _asked.add(optimizer)
    decaying = {id(p) for group in plain for p in group["params"]}
    layers = [layer for layer in living_layers() if not layer.enc_is_projected]
    count = sum(any(id(p) in decaying for p in layer.free_weights()) for layer in layers)
    if count:
        warn(
            f"ENC: the weights of {count} ENC layers decay without the epsilon shift, because their groups in "
            f"{type(optimizer).__name__} do not say how to shift it; build the groups with param_groups_enc(model, "
            "weight_decay), in a config with optim_wrapper=dict(constructor='ENCOptimWrapperConstructor'); "
            "shift_eps=0 there asks for plain decay"
        )


def _is_differentiable(optimizer: Optimizer) -> bool:
    return bool(optimizer.defaults.get("differentiable"))


class _Step(RunningStep):
    """A running call of ``step``: whether its groups were shifted, or are delegated to an inner call."""

    shifted = delegated = False


class _Shift:
    """The shift of one optimizer: its hooks, the decay kinds of its groups, and the running step."""

    def __init__(self, optimizer: Optimizer):
        self.warn: Callable[[str], None] = _warn
        self.warned: set[str] = set()
        self.kinds: dict[int, str] = {}
        self.offsets: Offsets = []
        self.decays: Decays = []
        self.step: _Step | None = None
        self.hook = optimizer.register_step_pre_hook(self.before_step).id
        register_first_post_hook(optimizer, self.after_step)
        carry_load_hook(optimizer, _see_loading)
        if hasattr(optimizer, "_optimizer_state_dict_pre_hooks"):
            # After a step that raised, the decay and the weights are not yet restored.
            optimizer.register_state_dict_pre_hook(self.restore)

    def warn_once(self, text: str) -> None:
        """Warn, unless the same warning was given before."""
        if text not in self.warned:
            self.warned.add(text)
            self.warn(f"ENC: {text}")

    def kind(self, optimizer: Optimizer, index: int, group: dict[str, Any]) -> str:
        """Decay kind of a group: from trial steps, unless ``decoupled`` was given and the kind is not AROUND."""
        if index not in self.kinds:
            check_group(group)
            self.kinds[index] = self._find_kind(optimizer, group)
        kind, decoupled = self.kinds[index], group.get("enc_decoupled")
        return kind if decoupled is None or kind == AROUND else WEIGHT if decoupled else GRADIENT

    # The trial steps must not be compiled. torch.optim uses this private decorator too: torch.compiler.disable would
    # import the compiler together with this module, which takes seconds.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _find_kind(self, optimizer: Optimizer, group: dict[str, Any]) -> str:
        kind, name = decay_kind(optimizer, group), type(optimizer).__name__
        if group.get("enc_decoupled") is None:
            if kind is None:
                self.warn_once(
                    f"unknown optimizer {name}: assuming that it applies weight decay through the gradient. "
                    "Pass decoupled=True (in a config: paramwise_cfg=dict(decoupled_decay=True)) if it shrinks the "
                    "weights themselves, like AdamW."
                )
            elif kind == WHOLE:
                self.warn_once(
                    f"{name} has no weight decay: the gradient of the shifted decay is added to weights with shift_eps "
                    "only, and the loss that the closure returns does not include it."
                )
        return kind or GRADIENT

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Shift the groups now, or after each call of the closure if the step has one."""
        groups = [(self.kind(optimizer, index, group), group) for index, group in shifted_groups(optimizer)]
        if not groups:
            return None
        start_momentum(optimizer)
        frame = calling_frame()
        own = [group for _, group in groups]
        outer = self.enclosing(frame, own)
        if outer is not None:
            if outer.shifted:
                return None
            outer.delegated = True
        step = self.step = _Step(frame, own)
        if frame is not None:
            _stepping.add(self)
        self.restore(optimizer)  # in case the previous step raised
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self.shift(optimizer, groups, step)
            return None

        def shifted_closure() -> Any:
            self.restore(optimizer)
            loss = closure()
            if not step.delegated:
                self.shift(optimizer, groups, step)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": shifted_closure}
        return (args[0], shifted_closure, *args[2:]), kwargs

    def enclosing(self, frame: FrameType | None, groups: list[dict[str, Any]]) -> _Step | None:
        """Outer call of ``step`` that encloses this one: a wrapper's, or one that calls ``super().step()``."""
        if frame is None:  # torch.compile has no Python frames
            return self.step
        steps = [shift.step for shift in list(_stepping) if shift.step is not None]
        return next((step for step in steps if step.shares(groups) and step.runs(frame)), None)

    def shift(self, optimizer: Optimizer, groups: list[tuple[str, dict[str, Any]]], step: _Step) -> None:
        """Shift ``groups``. The kind WEIGHT changes weights, so it acts only once if the closure runs several times."""
        # Fused optimizers unscale gradients, and skip steps with infinite ones, within their kernel, which runs later.
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        with torch.set_grad_enabled(_is_differentiable(optimizer)):
            for kind, group in groups:
                if not isinstance(group["weight_decay"], torch.Tensor) and group["weight_decay"] == 0:
                    self.warn_once(
                        "a group with shift_eps has weight_decay 0 within the step, so the shift has no effect; a "
                        "wrapper that applies weight decay itself (LARC) does not support the shift"
                    )
                if kind != WEIGHT or not step.shifted:
                    is_taken = takes_decay(kind, optimizer, group)
                    self.offsets += shift_group(WHOLE if is_taken else kind, group, scale, found_inf)
                    if is_taken:
                        replace_decay(group, 0.0, self.decays)
        step.shifted = True

    def after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Restore decay and weights, and warn if the step did not call its closure."""
        self.restore(optimizer)
        if self.step is not None and not self.step.shifted and not self.step.delegated:
            self.warn_once(f"{type(optimizer).__name__}.step did not call its closure, so the decay was not shifted")
        self.step = None
        if not torch.compiler.is_compiling():
            _stepping.discard(self)

    def restore(self, optimizer: Optimizer) -> None:
        """Restore ``weight_decay`` of the groups, and the weights that the kind AROUND has moved."""
        restore_decays(self.decays)
        if self.offsets:
            with torch.set_grad_enabled(_is_differentiable(optimizer)):
                restore(self.offsets)


_stepping: weakref.WeakSet[_Shift] = weakref.WeakSet()
_asked: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # whether they decay ENC weights without a shift


def _shift_of(optimizer: Optimizer) -> _Shift:
    """The ``_Shift`` of an optimizer; created on first use, also for copies and unpickled optimizers."""
    shift = vars(optimizer).get("_enc_shift")
    if shift is None:
        shift = vars(optimizer)["_enc_shift"] = _Shift(optimizer)
    return shift


def _see_loading(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """Load hook: groups keep their own shift, and warn if that of the loaded state differs."""
    shift = _shift_of(optimizer)
    shift.kinds.clear()
    groups = keep_shift(optimizer.param_groups, state["param_groups"], shift.warn)
    return None if groups is None else {**state, "param_groups": groups}


def _restore(optimizer: Optimizer) -> None:
    """Called before an optimizer that has the load hook is copied: its last step may have raised an error."""
    shift = vars(optimizer).get("_enc_shift")
    if shift is not None:
        shift.restore(optimizer)


def _see_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Step hook of all optimizers: install the hook that applies the shift of their groups, after all others."""
    if not torch.compiler.is_compiling():
        warn_of_plain_decay(optimizer)
    shifts = any("shift_eps" in group for group in optimizer.param_groups)
    if shifts and ("_enc_shift" in vars(optimizer) or shifted_groups(optimizer)):
        move_pre_hook_last(optimizer, _shift_of(optimizer).hook)


register_carried_hook(_see_loading, _restore)
register_optimizer_step_pre_hook(_see_step)
