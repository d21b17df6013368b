"""Optimizer-wrapper constructor: what decays, what does not, and the epsilon shift of the decay."""

from __future__ import annotations

import inspect
import logging
from functools import partial
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from torch import nn

from ..build import part_class
from ..functional.checks import check_type
from ..optim import DEFAULT_SHIFT_EPS, DecayRules, describe_groups
from ..projection import check_projection
from ..shift import add_shift
from .limits import refuse_sharding

# What the decay rules know, then what concerns mmengine and the optimizer.
_OPTIONS = (*DecayRules.OPTIONS, "bypass_duplicate", "decoupled_decay")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ENCOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    r"""Builds the optimizer with the paper's weight decay: weights decay, biases do not, ENC weights by the shifted L2.

    Biases, batch norm biases and learnable alphas get no decay, because the bound does not contain them (eq. 10-13).
    Batch norm weights keep theirs. The decay of an ENC weight is the gradient of the eps-shifted regularizer,
    :math:`\lambda (W - \epsilon U)` (:func:`enc_plugin.functional.shifted_l2_grad`), applied once in each optimizer
    step, after unscaling and clipping. Any torch optimizer works: with coupled decay (SGD, Adam, LARS) the shift joins
    the gradient; with decoupled decay (AdamW) it joins the decay, which Lamb scales together with the rest of the step.
    A resumed run uses the shift of its config, not of the checkpoint, and logs a warning if they differ. Parameters
    with equal settings share one group.

    Args:
        optim_wrapper_cfg: As for mmengine's default constructor.
        paramwise_cfg: A dict of options, or None. mmengine's own: ``custom_keys``, ``bias_lr_mult``,
            ``bias_decay_mult`` (default 0), ``norm_decay_mult`` (of norm weights), ``dwconv_decay_mult``,
            ``flat_decay_mult``, ``bypass_duplicate``. And here:

            - ``lr_mult``, ``decay_mult``: factors for all parameters.
            - ``shift_eps``: the shift eps, in units of W, default 1e-3; 0 is plain decay. Also within ``custom_keys``.
            - ``plain_shift``: a variant (``'ws'``, ...): plain convolutions and linear layers get its shift too, which
              separates the effect of the shift from that of the constraint. Default None: they get plain decay.
            - ``projection``: how weights are held on the constraint set if the model has ``enc=dict(how='project')``,
              ``'retract'`` (default) or ``'rotate'`` (:func:`enc_plugin.projection.add_projection`). Also within
              ``custom_keys``.
            - ``decoupled_decay``: whether the optimizer's decay is decoupled, for an optimizer where a trial step
              cannot tell.

            An entry of ``custom_keys`` applies to the parameters whose name contains the key. It changes only the
            settings that it names; biases among them stay without decay unless it sets ``decay_mult``.

    Raises:
        ValueError: If an option is unknown, a ``custom_keys`` entry matches no parameter, ``shift_eps`` is negative, or
            the model is sharded (FSDP).
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        for option in self.paramwise_cfg:
            if option not in _OPTIONS:
                raise ValueError(f"paramwise_cfg: unknown option {option!r}; expected any of {', '.join(_OPTIONS)}")
        self._rules()  # refuses a negative epsilon here, before there is a model
        # Take what the config leaves out from the optimizer's own defaults: AdamW decays by 0.01 unless told otherwise.
        defaults = inspect.signature(self._optimizer_class()).parameters
        if self.base_lr is None and "lr" in defaults:
            self.base_lr = defaults["lr"].default
        if self.base_wd is None and "weight_decay" in defaults:
            self.base_wd = defaults["weight_decay"].default

    def _validate_cfg(self) -> None:
        # The stock check rejects decay options without an explicit weight_decay; here the optimizer's default counts.
        check_type("paramwise_cfg", self.paramwise_cfg, dict, "a dict of options or None")
        check_type("custom_keys", self.paramwise_cfg.get("custom_keys", {}), dict, "a dict of a dict for each key")

    def _optimizer_class(self) -> type[torch.optim.Optimizer]:
        cls = part_class(self.optimizer_cfg, OPTIMIZERS)
        if cls is None:
            raise ValueError(f"optimizer: {self.optimizer_cfg['type']!r} is not in the registry of optimizers")
        return cls

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **_: Any) -> None:
        """Sort all parameters of ``module`` into as few groups as their settings allow, appended to ``params``."""
        params.extend(self._rules().groups(module, prefix))

    def _rules(self) -> DecayRules:
        return DecayRules(self.base_lr, self.base_wd, self.paramwise_cfg)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper for ``model``; distributed wrappers are looked through, sharded ones refused."""
        refuse_sharding(model)
        model = getattr(model, "module", model)
        # The stock constructor calls add_params only if paramwise_cfg is not empty.
        self.paramwise_cfg = self.paramwise_cfg or {"shift_eps": DEFAULT_SHIFT_EPS}
        wrapper = super().__call__(model)
        # Of a Config's optimizer, groups are of Config's own kind of dict, which torch.compile cannot trace.
        wrapper.optimizer.param_groups = [dict(group) for group in wrapper.optimizer.param_groups]
        warn = partial(print_log, logger="current", level=logging.WARNING)
        add_shift(wrapper.optimizer, self.paramwise_cfg.get("decoupled_decay"), warn=warn)
        check_projection(wrapper.optimizer)  # ENCProjectionHook starts it, once weights are initialised and loaded
        wrapper.optimizer.register_load_state_dict_pre_hook(_compare_with_checkpoint, prepend=True)
        print_log(describe_groups(wrapper.optimizer), logger="current")
        return wrapper


def _compare_with_checkpoint(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load hook: refuses groups that do not correspond to the config's, and says what is taken from the checkpoint."""
    own, saved = optimizer.param_groups, state["param_groups"]
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (own, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"paramwise_cfg: the checkpoint's optimizer has groups of {', '.join(map(str, saved_sizes))} parameters, "
            f"the config's of {', '.join(map(str, sizes))}; resume with the paramwise_cfg, model and version that "
            "wrote it, or start anew from its weights: load_from without resume"
        )
    differing = {
        (a["weight_decay"], b["weight_decay"])
        for a, b in zip(saved, own, strict=True)
        if "weight_decay" in a and "weight_decay" in b and a["weight_decay"] != b["weight_decay"]
    }
    for then, now in sorted(differing):
        print_log(
            f"ENC: weight_decay: the checkpoint has {then}, the config {now}; it goes on with {then}, because mmengine "
            "restores the optimizer's settings",
            logger="current",
            level=logging.WARNING,
        )
