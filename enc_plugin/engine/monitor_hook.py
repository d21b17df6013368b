"""Hook that logs what scale-invariant training does to the free weights: norm, rotation, effective learning rate."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from ..convert import enc_layers
from ..functional.weights import num_rows
from ..layers import ENCLayer
from ..measuring.untouched import unwrap
from .scalars import Group, Scalar

QUANTITIES = {  # title and unit
    "norm": ("Norm of the free weights W", "Frobenius norm of W"),
    "deviation": ("Deviation from the constraint", "|squared norm / alpha - 1|"),
    "angle": ("Rotation of W in one step", "angle (radians)"),
    "effective_lr": ("Effective learning rate", "lr / squared length of W"),
}
_GROUP = Group("Free weights", "Median over the ENC layers; band: smallest to largest.")


def _scalars(quantity: str, title: str, unit: str) -> Iterator[Scalar]:
    low, high = (f"enc_monitor/{quantity}/{bound}" for bound in ("min", "max"))
    yield Scalar(f"enc_monitor/{quantity}/median", title, unit, _GROUP, log=True, band=(low, high), by_iteration=True)
    yield from (Scalar(bound, title, unit, log=True, by_iteration=True) for bound in (low, high))
    yield Scalar(f"enc_monitor/<layer>/{quantity}", f"{title}: <layer>", unit, log=True, by_iteration=True)


@HOOKS.register_module()
class ENCMonitorHook(Hook):
    r"""Logs norm, constraint, rotation and effective learning rate of the ENC layers every ``interval`` iterations.

    The function of an ENC layer does not depend on the scale of W: only its direction is trained, at a speed that the
    scale sets. For each layer, after the measured step:

    ================  ==========================================================================================
    ``norm``          :math:`\lVert W \rVert_F`
    ``deviation``     :math:`|\lVert\hat W\rVert_F^2 / \alpha - 1|`: rounding when all is well
    ``angle``         radians between W before and after the step, 0 to pi
    ``effective_lr``  the step's learning rate over the square of the length that the layer's equation divides by:
                      :math:`\lVert W\rVert_F` (eq. 20), the mean over rows of :math:`\lVert W_j\rVert` (21) and of
                      :math:`\lVert W_j - \bar W_j\rVert` (22), :math:`\lVert W - \bar W\rVert_F` (23). It is the
                      learning rate that the direction sees (momentum not counted)
    ================  ==========================================================================================

    Scalars, with the iteration as step: ``enc_monitor/<quantity>/min``, ``/median`` and ``/max`` over the layers, which
    the log states in a line too; with ``per_layer`` also ``enc_monitor/<layer>/<quantity>``. With gradient accumulation
    the measurement waits for the iteration that steps. Only the main process measures: weights are equal on all.

    It only reads. A measurement costs a copy of the weights, one pass over them, and one wait for the device.

    Args:
        interval: Measure every ``interval`` iterations.
        per_layer: Log each layer's scalars, besides the summaries.

    Raises:
        ValueError: If ``interval`` is below 1.
    """

    priority = "HIGH"  # before ParamSchedulerHook changes the learning rate of the step
    scalars = tuple(s for quantity, texts in QUANTITIES.items() for s in _scalars(quantity, *texts))

    def __init__(self, interval: int = 100, per_layer: bool = False):
        if interval < 1:
            raise ValueError(f"interval: expected at least 1, got {interval!r}")
        self.interval = interval
        self.per_layer = per_layer
        self._layers: dict[str, ENCLayer] = {}
        self._before: list[Tensor] | None = None

    def before_train(self, runner: Runner) -> None:
        """Find the layers."""
        self._layers = dict(enc_layers(unwrap(runner.model)))
        if not self._layers:
            runner.logger.warning("ENCMonitorHook: this model has no ENC layers, nothing is measured")

    @master_only
    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Keep the weights of before a step that is to be measured."""
        if self._layers and self.every_n_train_iters(runner, self.interval):
            self._before = [layer.enc_free_weight.detach().clone() for layer in self._layers.values()]

    @master_only
    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        """Measure and log, unless gradients are still being accumulated."""
        wrapper = runner.optim_wrapper
        wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        if self._before is None or not all(w.should_update() for w in wrappers):
            return
        layers = list(self._layers.values())
        table = measure_step(layers, self._before, _learning_rates(wrappers, layers))
        self._before = None

        scalars, parts = {}, []
        for quantity, values in zip(QUANTITIES, table, strict=True):
            summary = {"min": values.min(), "median": values.quantile(0.5), "max": values.max()}  # NaN passes through
            scalars |= {f"enc_monitor/{quantity}/{key}": value.item() for key, value in summary.items()}
            parts.append(f"{quantity} {summary['min']:.3g} / {summary['median']:.3g} / {summary['max']:.3g}")
        if self.per_layer:
            for name, values in zip(self._layers, table.T.tolist(), strict=True):
                scalars |= {f"enc_monitor/{name}/{q}": value for q, value in zip(QUANTITIES, values, strict=True)}
        step = runner.iter + 1
        # Not through the message hub: the log of every later iteration would repeat its latest values.
        runner.visualizer.add_scalars(scalars, step=step, file_path=f"{runner.timestamp}.json")
        runner.logger.info(f"ENC monitor: iteration {step}, min / median / max of the layers: {', '.join(parts)}")


@torch.no_grad()
def measure_step(layers: list[ENCLayer], before: list[Tensor], learning_rates: list[float]) -> Tensor:
    """What a step has done to ``layers``, as :class:`ENCMonitorHook` defines it, with one wait for the device.

    Args:
        layers: ENC layers after the step, on one device.
        before: Their weights before it.
        learning_rates: Of each layer's weight in that step.

    Returns:
        ``(4, layers)`` in float64 on the CPU: norm, deviation, angle (radians), effective learning rate.
    """
    weights, what = [layer.enc_free_weight for layer in layers], [layer.effective_weight for layer in layers]
    dtype = functools.reduce(torch.promote_types, (w.dtype for w in weights), torch.float32)
    zero = weights[0].new_zeros((), dtype=dtype)
    # A row of What is the (centered) row of W over its length, times a factor: <W, What> sums the lengths.
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
    # The chord between the directions: unlike the cosine it keeps its digits where the angle is small.
    chord = ((change.square() - (new - old).square()).clamp(min=0) / (old * new)).sqrt()
    angle = 2 * torch.asin((chord / 2).clamp(max=1))
    deviation = (effective.square() / alpha - 1).abs()
    return torch.stack([new, deviation, angle, host(learning_rates) / length.square()])


def _learning_rates(wrappers: list[OptimWrapper], layers: list[ENCLayer]) -> list[float]:
    """Current learning rate of each layer's weight; 0 for one that no optimizer holds."""
    rates = {id(p): float(g["lr"]) for w in wrappers for g in w.optimizer.param_groups for p in g["params"]}
    return [rates.get(id(layer.enc_free_weight), 0.0) for layer in layers]
