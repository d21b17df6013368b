"""Hook that logs norm, rotation and effective learning rate of the free weights of ENC layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..functional.checks import check_integer
from ..functional.weights import num_rows
from ..layers import ENCLayer
from ..measuring.untouched import unwrap
from ..surgery.projected import Projected, constrained_layers
from .efolds import DecayTally
from .scalars import FigureGroup, Scalar, log_scalars
from .wrappers import optim_wrappers

STEP = {  # quantities of a measured step: title and unit
    "norm": ("Norm of the free weights W", "Frobenius norm of W"),
    "deviation": ("Deviation from the constraint", "|squared norm / alpha - 1|"),
    "angle": ("Rotation of W in one step", "angle (radians)"),
    "effective_lr": ("Effective learning rate", "lr / squared length of W"),
}
_GROUP = FigureGroup("Free weights", "Median over the layers; bands from the smallest to the largest value.")


def _scalars(quantity: str, title: str, unit: str, **options) -> Iterator[Scalar]:
    low, high = (f"enc_monitor/{quantity}/{bound}" for bound in ("min", "max"))
    yield Scalar(f"enc_monitor/{quantity}/median", title, unit, _GROUP, band=(low, high), by_iteration=True, **options)
    yield from (Scalar(bound, title, unit, by_iteration=True) for bound in (low, high))
    yield Scalar(f"enc_monitor/<layer>/{quantity}", f"{title}: <layer>", unit, by_iteration=True)


@HOOKS.register_module()
class ENCMonitorHook(Hook):
    r"""Logs norm, constraint, rotation, effective learning rate and decay of ENC layers every ``interval`` iterations.

    The function of an ENC layer does not depend on the scale of its free weight W. Training rotates W, and the scale
    determines how fast. For each layer, after the measured step:

    ================  ==========================================================================================
    ``norm``          :math:`\lVert W \rVert_F`
    ``deviation``     :math:`|\lVert\hat W\rVert_F^2 / \alpha - 1|`, which is rounding error if nothing is wrong
    ``angle``         angle between W before and after the step, in radians, 0 to pi
    ``effective_lr``  learning rate of the direction of W, without momentum: the learning rate of the step over the
                      square of the length by which the variant divides. This is :math:`\lVert W\rVert_F` for
                      ``'fro'``, :math:`\lVert W - \bar W\rVert_F` for ``'centered_fro'``, and the mean over rows of
                      :math:`\lVert W_j\rVert` for ``'wn'`` or :math:`\lVert W_j - \bar W_j\rVert` for ``'ws'``
    ``efolds``        e-folds by which weight decay alone has reduced :math:`\lVert W\rVert^2` so far
                      (:func:`enc_plugin.functional.decay_efolds`, with the settings of each step; only for SGD
                      and AdamW). Below 1, decay has had little effect
    ================  ==========================================================================================

    Scalars, with the iteration as step: ``enc_monitor/<quantity>/min``, ``/median`` and ``/max`` over the layers, which
    a log line shows too; with ``per_layer`` also ``enc_monitor/<layer>/<quantity>``. With gradient accumulation, the
    next iteration with an optimizer step is measured. Only the main process measures, because weights are equal on all.
    Checkpoints contain the e-folds, so a resumed run continues to count. For a model without ENC layers, only the
    e-folds of its convolutions and linear layers are logged.

    The hook changes nothing. A measurement costs a copy of the weights, one pass over them, and one wait for the
    device.

    Args:
        interval: Measure every ``interval`` iterations.
        per_layer: Log each layer's scalars, besides the summaries.

    Raises:
        ValueError: If ``interval`` is below 1.
    """

    priority = "HIGH"  # before ParamSchedulerHook changes the learning rate of the step
    scalars = (
        *(scalar for quantity, texts in STEP.items() for scalar in _scalars(quantity, *texts, log=True)),
        *_scalars("efolds", "Weight decay so far", "e-folds of the squared norm of W", column="e-folds of decay"),
    )

    def __init__(self, interval: int = 100, per_layer: bool = False):
        check_integer("interval", interval, 1)
        self.interval = interval
        self.per_layer = per_layer
        self._layers: dict[str, ENCLayer | Projected] = {}
        self._plain: dict[str, nn.Module] = {}
        self._before: list[Tensor] | None = None
        self._tally: DecayTally | None = None
        self._saved: list[list[float]] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the e-folds until training starts."""
        self._saved = checkpoint.get("efolds")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the e-folds to the checkpoint."""
        if self._tally is not None:
            checkpoint["efolds"] = self._tally.state()

    def before_train(self, runner: Runner) -> None:
        """Find the layers, and start counting the steps of the optimizers."""
        model = unwrap(runner.model)
        self._layers = dict(constrained_layers(model))
        if not self._layers:
            self._plain = {n: m for n, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear))}
            runner.logger.warning("ENCMonitorHook: this model has no ENC layers, so only e-folds of decay are logged")
        self._tally = DecayTally(wrapper.optimizer for wrapper in optim_wrappers(runner))
        if runner.iter and not (self._saved and self._tally.load(self._saved)):
            runner.logger.warning("ENCMonitorHook: the checkpoint has no e-folds of this optimizer, so they start at 0")

    @master_only
    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Copy the weights before a step that will be measured."""
        if self.every_n_train_iters(runner, self.interval):
            self._before = [layer.enc_free_weight.detach().clone() for layer in self._layers.values()]

    @master_only
    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        """Measure and log the step, unless gradients are still being accumulated."""
        wrappers = optim_wrappers(runner)
        if self._before is None or not all(w.should_update() for w in wrappers):
            return
        table: dict[str, Tensor] = {}
        if self._layers:
            layers = list(self._layers.values())
            table = dict(zip(STEP, measure_step(layers, self._before, _learning_rates(wrappers, layers)), strict=True))
        self._before = None
        weights = [x.enc_free_weight for x in self._layers.values()] or [x.weight for x in self._plain.values()]
        efolds = [self._tally.of(weight) for weight in weights]
        if efolds and None not in efolds:
            table["efolds"] = torch.tensor(efolds, dtype=torch.float64)
        self._log(runner, table)

    def _log(self, runner: Runner, table: dict[str, Tensor]) -> None:
        scalars, parts = {}, []
        for quantity, values in table.items():
            summary = {"min": values.min(), "median": values.quantile(0.5), "max": values.max()}  # NaN passes through
            scalars |= {f"enc_monitor/{quantity}/{key}": value.item() for key, value in summary.items()}
            parts.append(f"{quantity} {summary['min']:.3g} / {summary['median']:.3g} / {summary['max']:.3g}")
            if self.per_layer:
                layers = zip(self._layers or self._plain, values.tolist(), strict=True)
                scalars |= {f"enc_monitor/{name}/{quantity}": value for name, value in layers}
        if not table:
            return
        step = runner.iter + 1
        log_scalars(runner, scalars, step)
        runner.logger.info(f"ENC monitor: iteration {step}, min / median / max of the layers: {', '.join(parts)}")


@torch.no_grad()
def measure_step(layers: list[ENCLayer | Projected], before: list[Tensor], learning_rates: list[float]) -> Tensor:
    """Measure a step as :class:`ENCMonitorHook` describes, with a single wait for the device.

    Args:
        layers: ENC layers after the step, on one device.
        before: Free weights of the layers before the step.
        learning_rates: Learning rate of each layer's weight in the step.

    Returns:
        ``(4, layers)`` in float64 on the CPU: norm, deviation, angle (radians), effective learning rate.
    """
    weights, what = [layer.enc_free_weight for layer in layers], [layer.effective_weight for layer in layers]
    dtype = functools.reduce(torch.promote_types, (w.dtype for w in weights), torch.float32)
    zero = weights[0].new_zeros((), dtype=dtype)
    # A row of What is the (centered) row of W divided by its length, times a factor, so <W, What> sums the lengths.
    inner = [(w.to(dtype) * v).sum() for w, v in zip(weights, what, strict=True)]
    columns = [
        torch._foreach_norm(before, dtype=dtype),
        torch._foreach_norm(weights, dtype=dtype),
        torch._foreach_norm(torch._foreach_sub(weights, before), dtype=dtype),
        torch._foreach_norm(what, dtype=dtype),
        inner,
        [zero if layer.enc_log_alpha is None else layer.enc_log_alpha.to(dtype) for layer in layers],
    ]
    old, new, change, effective, inner, log_alpha = torch.stack([torch.stack(c) for c in columns]).cpu().double()
    host = functools.partial(torch.tensor, dtype=torch.float64)
    alpha = log_alpha.exp() * host([1.0 if layer.enc_log_alpha is not None else layer.enc_alpha for layer in layers])
    length = inner / (alpha * host([num_rows(layer.enc_free_weight, layer.enc_variant) for layer in layers])).sqrt()
    # Distance between the directions. Unlike the cosine, it is precise for small angles.
    chord = ((change.square() - (new - old).square()).clamp(min=0) / (old * new)).sqrt()
    angle = 2 * torch.asin((chord / 2).clamp(max=1))
    deviation = (effective.square() / alpha - 1).abs()
    return torch.stack([new, deviation, angle, host(learning_rates) / length.square()])


def _learning_rates(wrappers: list[OptimWrapper], layers: list[ENCLayer | Projected]) -> list[float]:
    """Current learning rate of each layer's weight; 0 if it is in no optimizer."""
    rates = {id(p): float(g["lr"]) for w in wrappers for g in w.optimizer.param_groups for p in g["params"]}
    return [rates.get(id(layer.enc_free_weight), 0.0) for layer in layers]
