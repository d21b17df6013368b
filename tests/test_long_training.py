"""Long training of scale-invariant weights against the length that stochastic gradients and decay balance at."""

from __future__ import annotations

import json
import statistics

import pytest

from lab.bench import long_training


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


def check(dtype: str, steps: int, lr: float, start: float) -> dict[str, dict]:
    """Every toy layer of a dtype against the closed form; the results."""
    toys = [toy for toy in long_training.TOYS if toy.dtype == dtype]
    found = long_training.simulate(toys, steps, lr, start)
    assert len(found) == 4 * 2 * 2
    for toy in toys:
        run = found[toy.name]
        lengths = [length / run["target"] for length in run["length"]]
        expected = closed_form(toy.shift, toy.noise, start, lr, steps)
        assert run["predicted"] / run["target"] == pytest.approx(expected, rel=0.01, abs=1e-12), toy.name
        if dtype == "bfloat16" and not toy.noise:
            continue
        assert run["first_bad"] is None, toy.name
        settled = statistics.mean(lengths[-10:]) if toy.noise else lengths[-1]
        assert settled == pytest.approx(expected, rel=0.02), toy.name
        assert run["effective_lr"][-1] == pytest.approx(lr / run["length"][-1] ** 2, rel=1e-3)
        if toy.noise:
            gradient = statistics.mean(value**2 for value in run["gradient"][-10:]) ** 0.5
            rows, _ = toy.freedom
            length = statistics.mean(run["length"][-10:])
            assert gradient == pytest.approx(toy.gradient_scale(lr) * rows**0.5 / length, rel=0.1), toy.name
    return found


def check_float32(found: dict[str, dict]) -> None:
    """Without the shift and a gradient the length shrinks and the effective learning rate grows, by orders."""
    for variant in long_training.VARIANTS:
        shifted, plain = (found[f"{variant}_{kind}_fitted_float32"] for kind in ("shifted", "plain"))
        assert plain["length"][-1] < 1e-3 * shifted["length"][-1]
        assert plain["effective_lr"][-1] > 1e6 * shifted["effective_lr"][-1]


def check_bfloat16(found: dict[str, dict]) -> None:
    """With the shift all is finite; what no noise dithers stops where the rest of the decay rounds away."""
    for variant in long_training.VARIANTS:
        run = found[f"{variant}_shifted_fitted_bfloat16"]
        assert run["first_bad"] is None
        assert 1 <= run["length"][-1] / run["target"] < 4


@pytest.mark.timeout(900)
def test_two_thousand_steps_settle_where_predicted_with_the_shift_and_shrink_without():
    check_float32(check("float32", 2000, lr=0.5, start=10.0))
    found = check("bfloat16", 2000, lr=0.5, start=10.0)
    check_bfloat16(found)
    assert all(found[f"{variant}_plain_fitted_bfloat16"]["length"][-1] < 1e-4 for variant in long_training.VARIANTS)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_fifty_thousand_steps_settle_where_predicted_with_the_shift_and_shrink_without():
    check_float32(check("float32", 50_000, **long_training.RUNS["float32"]))
    found = check("bfloat16", 50_000, **long_training.RUNS["bfloat16"])
    check_bfloat16(found)
    # A decay of 0.5 % a step, 50,000 times, with nothing to stop it: W reaches 0, and has no direction.
    assert all(found[f"{variant}_plain_fitted_bfloat16"]["first_bad"] > 5000 for variant in long_training.VARIANTS)


def test_the_recorded_run_is_of_fifty_thousand_steps_of_every_cell():
    record = json.loads((long_training.RESULTS / "long_training" / "long_training.json").read_text())
    assert record["settings"]["steps"] == 50_000
    assert set(record["cells"]) == {toy.name for toy in long_training.TOYS}
    bad = {name for name, run in record["cells"].items() if run["first_bad"] is not None}
    assert bad == {f"{variant}_plain_fitted_bfloat16" for variant in long_training.VARIANTS}
