"""Hook that checks and logs the norm constraint at the start and the end of training."""

from __future__ import annotations

import copy
import math
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ..convert import audit, enc_layers
from ..measuring.untouched import unwrap
from ..shift import warn_of_plain_decay
from ..surgery.eligible import refuse_weights_read_elsewhere
from ..surgery.projected import check_constrained, constrained_layers
from ..surgery.recording import RecordError, record_forward
from ..surgery.trace import Trace
from ..table import first_few
from .limits import warn_of_recomputation
from .scalars import Scalar, log_scalars
from .wrappers import optim_wrappers

DEVIATION_LIMIT = 1e-4  # rounding in float32 stays below 1e-6


@HOOKS.register_module()
class ENCAuditHook(Hook):
    r"""Logs how many layers are ENC and the largest deviation of :math:`\lVert\hat W\rVert_F^2` from alpha.

    Scalars, by epoch: ``enc/layers`` and ``enc/max_deviation`` (relative to alpha). The hook changes nothing.

    Before training, after initialisation and loading, it raises an error for weights that cannot be normalised, and
    warns if activation checkpointing will update batch norm statistics twice, or if ENC weights decay by other rules
    than those of :class:`ENCOptimWrapperConstructor`. On the first batch it raises an error if the network reads the
    free weight of an ENC layer outside of that layer, and warns of ENC layers that do not run.
    """

    priority = "VERY_LOW"
    scalars = (
        Scalar("enc/layers", "ENC layers", column="ENC layers", form=".0f"),
        Scalar(
            "enc/max_deviation",
            "Largest deviation of a squared norm from alpha",
            "|squared norm / alpha - 1|",
            column="deviation from alpha",
            form=".1e",
            limit=DEVIATION_LIMIT,
            beyond="The constraint is violated: the squared norm of a layer deviates from alpha by more than rounding.",
        ),
    )

    def before_train(self, runner: Runner) -> None:
        """Check and log the initial weights."""
        model = unwrap(runner.model)
        check_constrained(model)
        self._report(runner, model)
        warn_of_recomputation(runner, model)
        for wrapper in optim_wrappers(runner):
            warn_of_plain_decay(wrapper.optimizer, runner.logger.warning)
        self._is_checked = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check on the first batch which layers run and what reads their weights, in all processes alike."""
        if self._is_checked:
            return
        self._is_checked = True
        model = unwrap(runner.model)
        layers = dict(enc_layers(model))
        if not layers:
            return
        traces = _traces(model, data_batch)
        for trace in traces:
            refuse_weights_read_elsewhere(model, trace)
        idle = [name for name, layer in layers.items() if not any(layer in trace.calls for trace in traces)]
        if not traces:
            runner.logger.info("ENC: the model cannot be run on its own, so it is unknown what reads its weights")
        elif idle:
            runner.logger.warning(
                f"ENC: {len(idle)} ENC layers did not run on the first batch: {first_few(idle)}; if the network never "
                "uses them, leave them plain with exclude=[...]"
            )

    def after_train(self, runner: Runner) -> None:
        """Log the final weights."""
        self._report(runner, unwrap(runner.model))

    @master_only
    def _report(self, runner: Runner, model: nn.Module) -> None:
        table = audit(model)
        if not table:
            runner.logger.info("ENC: this model has no ENC layers")
            return
        kinds = sorted({f"{row.variant}, alpha {row.alpha:.4g}" for row in table})
        norms = sum(layer.enc_norm is not None for _, layer in constrained_layers(model))
        runner.logger.info(
            f"ENC: {len(table)} layers ({'; '.join(kinds[:4])}{'; ...' if len(kinds) > 4 else ''}), {norms} with an "
            f"added batch norm; squared norms equal alpha within {table.max_deviation:.1e} (relative)"
        )
        log_scalars(runner, {"enc/layers": len(table), "enc/max_deviation": table.max_deviation}, runner.epoch)
        if not table.max_deviation < DEVIATION_LIMIT:  # NaN too
            worst = max(table, key=lambda row: math.inf if math.isnan(row.deviation) else row.deviation)
            runner.logger.warning(
                f"ENC: the constraint is violated, worst in {worst.name!r} (deviation {worst.deviation:.1e})"
            )


def _traces(model: nn.Module, batch: Any) -> list[Trace]:
    """Recorded forward passes of ``model`` on a batch, in eval mode and with the training loss."""
    try:
        inputs = model.data_preprocessor(copy.deepcopy(batch), training=False)
    except Exception:  # a model or batch that differs from mmpretrain's
        return []
    traces = []
    for mode, training in (("tensor", False), ("loss", True)):
        try:
            traces.append(record_forward(model, {**inputs, "mode": mode}, training=training))
        except (RecordError, TypeError):
            continue
    return traces
