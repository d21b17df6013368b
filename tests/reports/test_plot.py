"""Figures: equal data gives equal bytes, other parts of a program see nothing of them, and odd data is drawn."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from enc_plugin.reports import plot
from enc_plugin.reports.plot import Series, curves

POINTS = Series("a", range(5), [1.0, 2.0, 4.0, 3.0, 5.0])


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def count(png: bytes, color: str, tolerance: int = 3) -> int:
    """Pixels of that colour, but for the rounding of the PNG's own palette."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(png) - wanted).max(-1) <= tolerance).sum())


def test_equal_data_gives_equal_bytes_and_leaves_backend_settings_and_pyplot_alone():
    # A process with nothing but this module: neither the plugin nor an earlier figure.
    code = """
import sys, matplotlib
sys.path.append(sys.argv[1])
from plot import Series, curves
before = dict(matplotlib.rcParams)
png = curves([Series("a", range(5), [1.0, 2.0, 4.0, 3.0, 5.0])], "epoch", "loss", "title")
assert dict(matplotlib.rcParams) == before
assert "matplotlib.pyplot" not in sys.modules
assert "torch" not in sys.modules
sys.stdout.buffer.write(png)
"""
    folder = str(Path(plot.__file__).parent)
    other = subprocess.run([sys.executable, "-c", code, folder], capture_output=True)
    assert other.returncode == 0, other.stderr.decode()
    mine = curves([POINTS], "epoch", "loss", "title")
    assert mine == other.stdout
    assert set(Image.open(io.BytesIO(mine)).info) == {"dpi"}
    assert mine != curves([POINTS], "epoch", "loss", "other title")


def test_twelve_long_noisy_series_stay_below_100_kb_and_differ_in_looks():
    rng = np.random.default_rng(0)
    series = [Series(f"a run with a rather long name {i}", range(5000), rng.random(5000) + i) for i in range(12)]
    assert len(curves(series, "iteration", "loss")) < 100_000
    looks = [str(sorted(plot.look(i).items())) for i in range(60)]
    assert len(set(looks)) == 60


def test_a_band_is_drawn_between_its_bounds():
    banded = Series("a", [0, 1], [1.0, 1.0], lower=[0.0, 0.0], upper=[2.0, 2.0])
    # A fifth of the colour on white.
    tint = "#{:02x}{:02x}{:02x}".format(*(round(255 - 0.2 * (255 - c)) for c in (0x00, 0x72, 0xB2)))
    assert count(curves([banded], "x", "y"), tint) > 20_000
    assert count(curves([Series("a", [0, 1], [1.0, 1.0])], "x", "y"), tint) < 50  # smoothed edges


def test_gaps_and_values_that_are_not_positive_are_drawn_on_any_axis():
    odd = [
        Series("nan", [1, 2], [math.nan, math.nan]),
        Series("inf", [1, 2, 3], [math.inf, 1.0, -math.inf], lower=[math.nan, -1.0, 0.0], upper=[math.inf, 2.0, 1.0]),
        Series("empty", [], []),
        Series("$ \\ _ é", [0, 1], [0.0, -1.0]),
    ]
    for log in (False, True):
        assert count(curves(odd, "x", "y", logy=log), plot.PALETTE[1]) > 10
        assert curves(odd[:1], "x", "y", logy=log)
    assert curves([], "x", "y", logy=True)


@pytest.mark.parametrize(("low", "high"), [(2.5, 40), (90, 125), (1975, 2150), (0.03, 1.2), (1, 1 + 1e-6), (1e-8, 1e8)])
def test_labels_of_a_logarithmic_axis_do_not_touch(low, high):
    axes = plot.new_axes("x", "y")
    axes.plot([low, high], [0, 1])
    axes.set_xscale("log")
    plot.log_ticks(axes.xaxis)
    axes.figure.canvas.draw()
    labels = [label for label in axes.get_xticklabels(which="both") if label.get_text() and label.get_visible()]
    inside = [label for label in labels if axes.get_xlim()[0] <= label.get_position()[0] <= axes.get_xlim()[1]]
    assert len({label.get_text() for label in inside}) == len(inside) >= 2
    boxes = sorted((label.get_window_extent() for label in inside), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
