"""The norm of scale-invariant weights over tens of thousands of steps, with and without the epsilon shift.

``python -m lab.bench.long_training`` runs 50,000 steps and writes a JSON file and a figure into
``lab/results/long_training/``.

"Length" is the norm of a row. Gradients of scale-invariant weights are orthogonal to them, and their norm is c / r for
rows of length r. So a step of SGD with learning rate lr and decay lambda towards the length e changes r to r' with

    r'^2 = ((1 - lr lambda) r + lr lambda e)^2 + (lr c / r)^2.

Up to terms of order lr lambda, the fixed point is at r^3 (r - e) = lr c^2 / (2 lambda): at e without a gradient, at
(lr c^2 / (2 lambda))^(1/4) without the shift, and at 0 without both.

Weights in bfloat16 have 8 bits, so a relative change below 2^-9 per step is lost in rounding. Their decay per step is
therefore ten times as large as that of the float32 weights, 5e-3 instead of 5e-4.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from enc_plugin import ENCLinear
from enc_plugin.engine.monitor_hook import measure_step
from enc_plugin.functional import VARIANTS
from enc_plugin.optim import add_shift, param_groups_enc
from lab import RESULTS

from .harness import machine

ROWS, COLUMNS = 16, 32
DECAY, SHIFT = 1e-2, 1e-3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RUNS = {"float32": {"lr": 0.05, "start": 1000.0}, "bfloat16": {"lr": 0.5, "start": 10.0}}


@dataclass(frozen=True)
class Toy:
    """One layer of the toy problem: a variant, with or without the shift, with or without gradient noise."""

    variant: str
    shift: bool
    noise: bool
    dtype: str

    @property
    def name(self) -> str:
        """A unique name that is valid as the name of a module."""
        return "_".join(
            [self.variant, "shifted" if self.shift else "plain", "noisy" if self.noise else "fitted", self.dtype]
        )

    @property
    def target(self) -> float:
        """Target length of the shift. Its eps is this length, or for centered variants the standard deviation."""
        elements = {"ws": COLUMNS, "centered_fro": ROWS * COLUMNS}.get(self.variant, 1)
        return SHIFT * math.sqrt(elements)

    @property
    def freedom(self) -> tuple[int, int]:
        """Number of rows that are normalised independently, and degrees of freedom of the direction of each."""
        rows = ROWS if self.variant in ("wn", "ws") else 1
        return rows, ROWS * COLUMNS // rows - (2 if self.variant in ("ws", "centered_fro") else 1)

    def gradient_scale(self, lr: float) -> float:
        """c; chosen so that noise without the shift has its fixed point at the target of the shift; 0 without noise."""
        return math.sqrt(2 * DECAY * self.target**4 / lr) if self.noise else 0.0

    def noise_std(self, lr: float) -> float:
        """Standard deviation of the elements of the gradient with respect to What."""
        rows, directions = self.freedom
        return self.gradient_scale(lr) * math.sqrt(rows / directions)

    def predicted(self, lr: float, start: float, steps: int) -> float:
        """Length after ``steps`` steps, by the recursion above."""
        target, c, length = self.target if self.shift else 0.0, self.gradient_scale(lr), start
        for _ in range(steps):
            length = math.hypot((1 - lr * DECAY) * length + lr * DECAY * target, lr * c / length)
        return length


TOYS = [
    Toy(variant, shift, noise, dtype)
    for dtype in DTYPES
    for noise in (True, False)
    for shift in (True, False)
    for variant in VARIANTS
]


def simulate(toys: list[Toy], steps: int, lr: float, start: float, records: int = 50) -> dict[str, dict]:
    """Train all toys at once with SGD, ``param_groups_enc`` and ``add_shift``; weights and noise have seed 0.

    Args:
        toys: The toys to train.
        steps: Number of steps.
        lr: Learning rate.
        start: Initial length of the rows, in units of :attr:`Toy.target`.
        records: Number of measurements, evenly spaced.

    Returns:
        For each toy by name, lists over the measured steps: ``step``, ``length`` (mean over rows), ``gradient``
        (Frobenius norm), ``effective_lr``; and ``target``, ``predicted`` (final length), ``norm`` (final norm of W),
        ``first_bad`` (first step with NaN or infinity in weights or gradients, or None).
    """
    torch.manual_seed(0)
    layers = {}
    for toy in toys:
        layer = ENCLinear(COLUMNS, ROWS, bias=False, variant=toy.variant)
        length = measure_step([layer], [layer.weight.detach()], [1.0])[3].rsqrt().item()
        layer.weight.data.mul_(start * toy.target / length)
        layers[toy.name] = layer.to(DTYPES[toy.dtype])
    model = nn.ModuleDict(layers)
    groups = param_groups_enc(model, DECAY, shift_eps=SHIFT, custom_keys={"plain": {"shift_eps": 0.0}})
    optimizer = torch.optim.SGD(groups, lr=lr)
    add_shift(optimizer)

    stds = torch.tensor([toy.noise_std(lr) for toy in toys])[:, None, None]
    modules = list(layers.values())
    weights = [layer.weight for layer in modules]
    table, finite_steps = [], torch.zeros(len(toys), dtype=torch.int64)
    for step in range(1, steps + 1):
        noise = stds * torch.randn(len(toys), ROWS, COLUMNS)
        optimizer.zero_grad()
        sum((layer.effective_weight * g).sum() for layer, g in zip(modules, noise, strict=True)).backward()
        gradient = torch.stack(torch._foreach_norm([w.grad for w in weights], dtype=torch.float32))
        record = step % (steps // records) == 0
        before = [w.detach().clone() for w in weights] if record else None
        optimizer.step()
        norms = torch.stack(torch._foreach_norm(weights, dtype=torch.float32))
        finite_steps += (gradient + norms).isfinite() & (finite_steps == step - 1)
        if record:
            norm, _, _, effective_lr = measure_step(modules, before, [lr] * len(modules))
            table.append((step, norm, (lr / effective_lr).sqrt(), gradient.double(), effective_lr))

    found = {}
    for i, toy in enumerate(toys):
        found[toy.name] = {
            "target": toy.target,
            "predicted": toy.predicted(lr, start * toy.target, steps),
            "first_bad": None if finite_steps[i] == steps else finite_steps[i].item() + 1,
            "norm": table[-1][1][i].item(),
            "step": [row[0] for row in table],
            "length": [row[2][i].item() for row in table],
            "gradient": [row[3][i].item() for row in table],
            "effective_lr": [row[4][i].item() for row in table],
        }
    return found


def draw_lengths(found: dict[str, dict], path: Path) -> None:
    """Draw length, gradient and effective learning rate of float32 weights, and the length of bfloat16 weights."""
    import matplotlib.pyplot as plt

    looks = {
        ("shifted", "noisy"): ("C0", "-", "shift, gradient noise"),
        ("plain", "noisy"): ("C1", "-", "no shift, gradient noise"),
        ("shifted", "fitted"): ("C0", "--", "shift, no gradient"),
        ("plain", "fitted"): ("C1", "--", "no shift, no gradient"),
    }
    panels = [
        ("float32", "length", "length of W / length of the shift"),
        ("float32", "gradient", "norm of the gradient / its first value"),
        ("float32", "effective_lr", "effective learning rate, lr / length²"),
        ("bfloat16", "length", "length of W / length of the shift"),
    ]
    with plt.style.context(["tableau-colorblind10", {"font.size": 11, "axes.grid": True, "grid.alpha": 0.3}]):
        figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
        for axis, (dtype, quantity, label) in zip(axes.flat, panels, strict=True):
            for (shift, noise), (color, line, legend) in looks.items():
                for variant in VARIANTS:
                    run = found[f"{variant}_{shift}_{noise}_{dtype}"]
                    unit = {"length": run["target"], "gradient": run["gradient"][0]}.get(quantity, 1.0)
                    if not unit:  # no gradient at all
                        continue
                    values = [value / unit for value in run[quantity]]
                    axis.plot(run["step"], values, color=color, linestyle=line, label=legend, alpha=0.8)
                    if quantity == "length" and run["first_bad"] is None:
                        mark = axis.plot(run["step"][-1], run["predicted"] / unit, "kx", markersize=9)
            if quantity == "effective_lr":
                for names, variant in (("fro, wn", "wn"), ("ws", "ws"), ("centered_fro", "centered_fro")):
                    height = found[f"{variant}_shifted_noisy_float32"]["effective_lr"][-1]
                    axis.annotate(names, (run["step"][-1], height), (0, 6), textcoords="offset points", ha="right")
            axis.set_yscale("log")
            if quantity == "length":
                axis.set_ylim(bottom=1e-9)  # lengths without shift and gradient shrink far below
            axis.set_title(f"{dtype}, lr {RUNS[dtype]['lr']}, decay {DECAY}", fontsize=11)
            axis.set_ylabel(label)
        for axis in axes[1]:
            axis.set_xlabel("step")
        handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
        axes[0, 0].legend([*handles.values(), *mark], [*handles, "predicted"], fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def main() -> None:
    """Run all steps and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "long_training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for dtype, settings in RUNS.items():
        found |= simulate([toy for toy in TOYS if toy.dtype == dtype], args.steps, **settings)
    draw_lengths(found, args.out / "long_training.png")
    rounded = {
        name: {key: [_rounded(x) for x in value] if isinstance(value, list) else value for key, value in run.items()}
        for name, run in found.items()
    }
    settings = {"steps": args.steps, **RUNS, "weight_decay": DECAY, "shift_eps": SHIFT, "shape": [ROWS, COLUMNS]}
    text = json.dumps({"machine": machine(), "settings": settings, "cells": rounded})
    (args.out / "long_training.json").write_text(text.replace('}, "', '},\n"') + "\n")


def _rounded(value: float) -> float | None:
    """Round to four digits; None for NaN and infinity, which JSON does not have."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


if __name__ == "__main__":
    main()
