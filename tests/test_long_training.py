"""Long training of scale-invariant weights against the length that stochastic gradients and decay balance at."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "bench"))
spec = importlib.util.spec_from_file_location("long_training", ROOT / "bench" / "long_training.py")
long_training = importlib.util.module_from_spec(spec)
sys.modules["long_training"] = long_training
spec.loader.exec_module(long_training)


def closed_form(shifted: bool, noisy: bool, start: float, lr: float, steps: int) -> float:
    """Length in units of the shift's, from the balance r^3 (r - e) = 1 (the noise is scaled so) or the bare decay."""
    e = 1.0 if shifted else 0.0
    if not noisy:
        return e + (start - e) * (1 - lr * long_training.DECAY) ** steps
    low, high = 1.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if middle**3 * (middle - e) > 1 else (middle, high)
    return low


def check(steps: int, lr: float, start: float) -> None:
    found = long_training.simulate(steps, lr, start)
    assert len(found) == 4 * 2 * 2 * 2
    for cell in long_training.CELLS:
        run = found[cell.name]
        assert run["finite"], cell.name
        lengths = [length / run["target"] for length in run["length"]]
        assert lengths[0] < start
        expected = closed_form(cell.shift, cell.noise, start, lr, steps)
        assert run["predicted"] / run["target"] == pytest.approx(expected, rel=0.01), cell.name
        if cell.dtype == "bfloat16" and not cell.noise:
            # Without noise that dithers it, a decay below half a unit of the last place changes nothing.
            assert lengths[-1] > expected * 0.2, cell.name
            continue
        settled = statistics.mean(lengths[-10:]) if cell.noise else lengths[-1]
        assert settled == pytest.approx(expected, rel=0.02), cell.name
        # The effective learning rate is bounded by the shift, and grows as the length shrinks without it.
        assert run["effective_lr"][-1] == pytest.approx(lr / run["length"][-1] ** 2, rel=1e-3)
        if cell.noise:
            gradient = statistics.mean(value**2 for value in run["gradient"][-10:]) ** 0.5
            rows, _ = cell.freedom
            length = statistics.mean(run["length"][-10:])
            assert gradient == pytest.approx(cell.gradient_scale(lr) * rows**0.5 / length, rel=0.1), cell.name
    for variant in long_training.VARIANTS:
        shifted, plain = (found[f"{variant}_{kind}_fitted_float32"] for kind in ("shifted", "plain"))
        assert plain["length"][-1] < 1e-3 * shifted["length"][-1]
        assert plain["effective_lr"][-1] > 1e6 * shifted["effective_lr"][-1]


@pytest.mark.timeout(900)
def test_with_the_shift_two_thousand_steps_settle_where_predicted_and_without_they_shrink():
    check(steps=2000, lr=0.5, start=10.0)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_with_the_shift_fifty_thousand_steps_settle_where_predicted_and_without_they_shrink():
    check(steps=50_000, lr=0.05, start=1000.0)


def test_the_recorded_run_is_of_fifty_thousand_steps_of_every_cell():
    record = json.loads((long_training.RESULTS / "long_training.json").read_text())
    assert record["settings"]["steps"] == 50_000
    assert set(record["cells"]) == {cell.name for cell in long_training.CELLS}
    assert all(run["finite"] for run in record["cells"].values())
