"""Optimizer-wrapper constructor with the paper's weight decay."""

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

_OPTIONS = (*DecayRules.OPTIONS, "bypass_duplicate", "decoupled_decay")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ENCOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    r"""Builds an optimizer with the paper's weight decay.

    Biases, batch norm biases and learnable alphas do not decay, because the bound does not contain them (eq. 10-13).
    Nor do parameters that a network exempts by ``no_weight_decay()`` (position embeddings of timm's transformers).
    Batch norm weights decay. The decay of an ENC weight is the gradient of the eps-shifted L2 regularizer,
    :math:`\lambda (W - \epsilon U)` (:func:`enc_plugin.functional.shifted_l2_grad`), applied once per optimizer step,
    after unscaling and clipping. Any torch optimizer works: with coupled decay (SGD, Adam, LARS) the shift is added to
    the gradient; with decoupled decay (AdamW, Lamb) it is added to the decay. A resumed run uses the shift of its
    config, not that of the checkpoint, and warns if they differ. Parameters with equal settings share one group.

    Args:
        optim_wrapper_cfg: As for mmengine's default constructor.
        paramwise_cfg: A dict of options, or None. Options of mmengine: ``custom_keys``, ``bias_lr_mult``,
            ``bias_decay_mult`` (default 0), ``norm_decay_mult`` (of norm weights), ``dwconv_decay_mult``,
            ``flat_decay_mult``, ``bypass_duplicate``. Further options:

            - ``lr_mult``, ``decay_mult``: factors for all parameters.
            - ``shift_eps``: the shift eps, in units of W, default 1e-3; 0 is plain decay. Also within ``custom_keys``.
            - ``plain_shift``: variant (``'ws'``, ...) whose shift plain convolutions and linear layers get too, to
              measure the effect of the shift without the constraint. Default None: they get plain decay.
            - ``projection``: how weights are projected onto the constraint set if the model has
              ``enc=dict(how='project')``: ``'retract'`` (default) or ``'rotate'``
              (:func:`enc_plugin.projection.add_projection`). Also within ``custom_keys``.
            - ``decoupled_decay``: whether the optimizer's decay is decoupled. Default None: determined by trial steps.

            An entry of ``custom_keys`` applies to the parameters whose name contains the key. It changes only the
            settings that it contains; biases still do not decay unless it sets ``decay_mult``.

    Raises:
        ValueError: If an option is unknown, a ``custom_keys`` entry matches no parameter (unless it is a mere
            ``decay_mult=0``, which causes a warning), ``shift_eps`` is negative, or the model is sharded (FSDP).
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        # mmpretrain's Twins configs misspell _delete_, which mmengine's constructor ignores.
        self.paramwise_cfg = {key: value for key, value in self.paramwise_cfg.items() if key != "_delete"}
        for option in self.paramwise_cfg:
            if option not in _OPTIONS:
                raise ValueError(
                    f"paramwise_cfg: unknown option {option!r}; expected any of {', '.join(_OPTIONS)}; drop one "
                    "that the config inherits for another constructor with paramwise_cfg=dict(_delete_=True, ...)"
                )
        self._rules()  # raises for bad options now, before the model is built
        # Settings that the config leaves out have the optimizer's defaults: AdamW's weight decay is 0.01.
        defaults = inspect.signature(self._optimizer_class()).parameters
        if self.base_lr is None and "lr" in defaults:
            self.base_lr = defaults["lr"].default
        if self.base_wd is None and "weight_decay" in defaults:
            self.base_wd = defaults["weight_decay"].default

    def _validate_cfg(self) -> None:
        # The stock check rejects decay options without an explicit weight_decay, although the optimizer has a default.
        check_type("paramwise_cfg", self.paramwise_cfg, dict, "a dict of options or None")
        check_type("custom_keys", self.paramwise_cfg.get("custom_keys", {}), dict, "a dict of a dict for each key")

    def _optimizer_class(self) -> type[torch.optim.Optimizer]:
        cls = part_class(self.optimizer_cfg, OPTIMIZERS)
        if cls is None:
            raise ValueError(f"optimizer: {self.optimizer_cfg['type']!r} is not in mmengine's registry of optimizers")
        return cls

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **_: Any) -> None:
        """Append the groups of all parameters of ``module`` to ``params``."""
        self._leave_out_idle_exemptions(module, prefix)
        params.extend(self._rules().groups(module, prefix))

    def _leave_out_idle_exemptions(self, module: nn.Module, prefix: str) -> None:
        """Remove entries of ``custom_keys`` that only exempt from decay, and match no parameter; warn of them.

        A third of mmpretrain's configs inherit such entries, for position embeddings that their networks do not have.
        """
        custom_keys = self.paramwise_cfg.get("custom_keys", {})
        names = [name for name, _ in module.named_parameters(prefix=prefix)]
        exempt = [key for key, settings in custom_keys.items() if dict(settings) == {"decay_mult": 0}]
        idle = [key for key in exempt if not any(key in name for name in names)]
        if idle:
            kept = {key: settings for key, settings in custom_keys.items() if key not in idle}
            self.paramwise_cfg = {**self.paramwise_cfg, "custom_keys": kept}
            print_log(
                f"ENC: custom_keys: no parameter is exempted from decay by {', '.join(map(repr, idle))}, because none "
                "has such a name",
                logger="current",
                level=logging.WARNING,
            )

    def _rules(self) -> DecayRules:
        return DecayRules(self.base_lr, self.base_wd, self.paramwise_cfg)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper for ``model``, which may be wrapped by DDP, but not sharded."""
        refuse_sharding(model)
        model = getattr(model, "module", model)
        # The stock constructor calls add_params only if paramwise_cfg is not empty.
        self.paramwise_cfg = self.paramwise_cfg or {"shift_eps": DEFAULT_SHIFT_EPS}
        wrapper = super().__call__(model)
        # The groups are ConfigDicts, which torch.compile cannot trace.
        wrapper.optimizer.param_groups = [dict(group) for group in wrapper.optimizer.param_groups]
        warn = partial(print_log, logger="current", level=logging.WARNING)
        if any("enc_variant" in group for group in wrapper.optimizer.param_groups):
            add_shift(wrapper.optimizer, self.paramwise_cfg.get("decoupled_decay"), warn=warn)
        check_projection(wrapper.optimizer)  # ENCProjectionHook projects, after weights are initialised and loaded
        wrapper.optimizer.register_load_state_dict_pre_hook(_compare_with_checkpoint, prepend=True)
        print_log(describe_groups(wrapper.optimizer), logger="current")
        return wrapper


def _compare_with_checkpoint(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load hook: raise if the groups do not match the config's, and warn of a different weight decay."""
    own, saved = optimizer.param_groups, state["param_groups"]
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (own, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"paramwise_cfg: the checkpoint's optimizer has groups of {', '.join(map(str, saved_sizes))} parameters, "
            f"the config's of {', '.join(map(str, sizes))}; resume with the paramwise_cfg, model and version that "
            "wrote it, or start a new run from its weights: load_from without resume"
        )
    differing = {
        (a["weight_decay"], b["weight_decay"])
        for a, b in zip(saved, own, strict=True)
        if "weight_decay" in a and "weight_decay" in b and a["weight_decay"] != b["weight_decay"]
    }
    for then, now in sorted(differing):
        print_log(
            f"ENC: weight_decay: the checkpoint has {then}, the config {now}; training continues with {then}, because "
            "mmengine restores the optimizer's settings",
            logger="current",
            level=logging.WARNING,
        )
