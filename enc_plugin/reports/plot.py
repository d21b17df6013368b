"""Figures in one style: curves with error bands, as the bytes of a PNG.

    png = curves([Series("ENC", [1, 2], [70, 80], lower=[68, 79], upper=[72, 81])], "epoch", "top-1 accuracy (%)")
    save(png, "accuracy.png")

For other figures, use :func:`new_axes` or :func:`new_figure`, :func:`look` for the style of a series, and
:func:`to_png`. Figures use only matplotlib's objects: no pyplot, no backend, no rcParams. Equal data gives equal bytes.
Series differ in colour (the palette of Okabe and Ito, for colour-blind readers), in marker and in dash.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from PIL import Image

# The palette of Okabe and Ito without yellow, which is hardly visible on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>pP"
# The lengths of these three lists are pairwise coprime, so a style repeats only after hundreds of series.
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
DPI = 170
SIZE = (4.6, 3.3)  # inches; the text stays readable at the width of a phone
MANY_POINTS = 30  # with this many points or more, only some get a marker
LONGEST_LABEL = 40  # characters


@dataclass(frozen=True)
class Series:
    """A named curve; ``lower`` and ``upper`` bound a band around ``y``. Values that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    lower: Sequence[float] | None = None
    upper: Sequence[float] | None = None

    @classmethod
    def with_error(cls, name: str, x: Sequence[float], y: Sequence[float], error: Sequence[float]) -> Series:
        """A curve with the band ``y - error`` to ``y + error``."""
        y, error = np.asarray(y, dtype=np.float64), np.asarray(error, dtype=np.float64)
        return cls(name, x, y, y - error, y + error)


def look(index: int) -> dict:
    """Arguments ``color``, ``marker`` and ``linestyle`` of the series with number ``index``."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def new_figure(size: tuple[float, float]) -> Figure:
    """Empty figure with the given width and height in inches."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_axes(xlabel: str, ylabel: str, title: str = "", size: tuple[float, float] = SIZE) -> Axes:
    """Empty axes on a new figure (``axes.figure``) of ``size`` inches."""
    axes = new_figure(size).subplots()
    axes.set_xlabel(xlabel)
    # Labels longer than the axis are wrapped, except for formulas.
    lines = [[line] if "$" in line else textwrap.wrap(line, int(size[1] * 11)) for line in ylabel.split("\n")]
    axes.set_ylabel("\n".join(part for parts in lines for part in parts))
    if title:
        axes.set_title("\n".join(textwrap.wrap(title, int(size[0] * 9))), fontsize=11)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def draw(axes: Axes, series: Series, index: int, **keywords) -> None:
    """Draw a line with its band in the style of ``index``; ``keywords`` of ``Axes.plot`` take precedence."""
    y = _finite(series.y)
    options = look(index) | {"linewidth": 1.4, "markersize": 4.5, "label": shorten(series.name)} | keywords
    if len(y) >= MANY_POINTS:
        # A few markers, at other points for each series.
        every = max(1, len(y) // 8)
        options.setdefault("markevery", (index * every // 5 % len(y), every))
    axes.plot(series.x, y, **options)
    if series.lower is not None and series.upper is not None:
        band = (_finite(series.lower), _finite(series.upper))
        axes.fill_between(series.x, *band, color=options["color"], alpha=0.2, linewidth=0)


def curves(
    series: Sequence[Series | None],
    xlabel: str,
    ylabel: str,
    title: str = "",
    *,
    logy: bool = False,
    ylim: tuple[float | None, float | None] | None = None,
    whole_x: bool = False,
) -> bytes:
    """Lines with error bands, as a PNG.

    Args:
        series: Curves in the order of the legend. None skips a series but keeps its style, so that a run has the same
            style in every figure.
        xlabel: Label of x, with its unit.
        ylabel: Label of y, with its unit.
        title: Title above the axes.
        logy: Logarithmic y axis; ignored if no value is positive.
        ylim: Limits of y; None: from the data.
        whole_x: Put ticks of x only at integers, as for epochs.
    """
    axes = new_axes(xlabel, ylabel, title)
    drawn = [(index, one) for index, one in enumerate(series) if one is not None]
    for index, one in drawn:
        draw(axes, one, index)
    if whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if logy and any(np.any(_finite(one.y) > 0) for _, one in drawn):
        axes.set_yscale("log")
    if ylim is not None:
        axes.set_ylim(*ylim)
    if axes.get_yscale() == "log":
        log_ticks(axes.yaxis)
    legend_below(axes)
    return to_png(axes.figure)


def to_png(figure: Figure, colors: int | None = 256) -> bytes:
    """The figure as a PNG without date or version; ``colors=None`` keeps all colours, for photographs."""
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    if colors is not None:
        # A palette without dithering makes the file of a chart three times smaller and does not change its look.
        image = image.quantize(colors, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True, dpi=(figure.dpi, figure.dpi))
    return buffer.getvalue()


def smaller(png: bytes) -> bytes:
    """A PNG as a WebP with 65 % of the width and half the bytes, for a page with many figures."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image = image.resize([round(0.65 * pixels) for pixels in image.size], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="webp", quality=80)
    return buffer.getvalue()


def save(png: bytes, path: str | Path) -> None:
    """Write a PNG; its folder is created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(png)


def shorten(label: str) -> str:
    """Shorten a label to its first and last characters, ``LONGEST_LABEL`` in total, and escape ``$``."""
    if len(label) > LONGEST_LABEL:
        half = LONGEST_LABEL // 2
        label = f"{label[:half]}\N{HORIZONTAL ELLIPSIS}{label[1 - half :]}"
    return label.replace("$", r"\$")


def legend_below(axes: Axes) -> None:
    """Add a legend below the axes, in as many columns as fit; the figure grows and the axes keep their size."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    figure = axes.figure
    width, height = figure.get_size_inches()
    # A character is about 0.085 inches wide, a legend handle half an inch.
    columns = max(1, min(len(labels), int(width / (0.55 + 0.085 * max(map(len, labels))))))
    figure.set_size_inches(width, height + 0.1 + 0.21 * math.ceil(len(labels) / columns))
    options = {"frameon": False, "fontsize": 9, "handlelength": 2.6, "columnspacing": 1.2}
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **options)


def log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis of at most two decades with plain numbers; matplotlib's powers of ten would overlap."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades > 2:
        return
    if decades > 0.7:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
    else:
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(ScalarFormatter(useOffset=False))  # as many digits as the ticks need to differ
    axis.set_minor_formatter(NullFormatter())


def _finite(values: Sequence[float]) -> np.ndarray:
    """Convert to float64 with NaN for values that are not finite; matplotlib leaves a gap there."""
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)
