"""Draws the figures of a study, in the look of :mod:`enc_plugin.reports.plot`."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from enc_plugin.reports import plot

from .claims import ENC, PLAIN
from .figures import OTHERS, SHOWN, Figure
from .grid import GAUGES

# A class looks as its method does in curves (GAUGES are of plain, plain + BN, WS, and ENC); other recipes are grey.
_CLASS_SLOTS = dict(zip(GAUGES, (SHOWN.index(cell) for cell in (PLAIN, "bn", "ws", ENC)), strict=True))
_OTHER_LOOKS = dict(zip(OTHERS, (("#999999", "p"), ("#333333", "P")), strict=True))


def to_picture(figure: Figure) -> bytes:
    """The figure as a PNG."""
    if figure.kind == "intervals":
        return _cells(figure)
    if figure.kind == "scatter":
        return _points(figure)
    return _curves(figure)


def _cells(figure: Figure) -> bytes:
    """A row a cell: its mean and interval in the look of its class, and a band behind them all."""
    axes = plot.new_axes(figure.x_label, "", size=(6.4, 1.1 + 0.26 * max(2, len(figure.data))))
    named = set()
    for place, row in enumerate(figure.data):
        color, mark = _class_look(row["group"])
        error = None if row["low"] is None else [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
        axes.errorbar(
            row["mean"],
            place,
            xerr=error,
            fmt=mark,
            color=color,
            capsize=3.5,
            linewidth=1.6,
            markersize=6,
            label=None if row["group"] in named else row["group"],
        )
        named.add(row["group"])
    if figure.band is not None:
        axes.axvspan(
            *figure.band, color=plot.PALETTE[0], alpha=0.13, linewidth=0, zorder=0.5, label="interval of plain"
        )
    axes.set_yticks(range(len(figure.data)), [plot.shorten(row["label"]) for row in figure.data])
    axes.set_ylim(len(figure.data) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    plot.legend_below(axes)
    return plot.to_png(axes.figure)


def _class_look(group: str) -> tuple[str, str]:
    """Colour and mark of the cells of a class."""
    if group in _OTHER_LOOKS:
        return _OTHER_LOOKS[group]
    look = plot.look(_CLASS_SLOTS[group])
    return look["color"], look["marker"]


def _points(figure: Figure) -> bytes:
    """Unconnected points, a look for each series."""
    axes = plot.new_axes(figure.x_label, figure.y_label)
    for one in figure.data:
        options = plot.look(one["slot"]) | {"linestyle": "none", "markersize": 6, "alpha": 0.8}
        axes.plot(one["x"], one["y"], label=plot.shorten(one["label"]), **options)
    if figure.log_x:
        axes.set_xscale("log")
        plot.log_ticks(axes.xaxis)
    if figure.log_y:
        axes.set_yscale("log")
        plot.log_ticks(axes.yaxis)
    plot.legend_below(axes)
    return plot.to_png(axes.figure)


def _curves(figure: Figure) -> bytes:
    """Lines with bands, each named at its end."""
    axes = plot.new_axes(figure.x_label, figure.y_label, size=(6.2, 3.3))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if figure.log_y:
        axes.set_yscale("log")
    ends = []
    for place, one in enumerate(figure.data):
        if one is not None:
            color = one.get("color", plot.look(place)["color"])
            series = plot.Series(one["label"], one["x"], one["mean"], one["low"], one["high"])
            plot.draw(axes, series, place, color=color)
            ends.append((one["mean"][-1], one["label"], color))
    if figure.y_limits is not None:
        axes.set_ylim(*figure.y_limits)
    if figure.log_y:
        plot.log_ticks(axes.yaxis)
    _name_ends(axes, ends)
    return plot.to_png(axes.figure)


def _name_ends(axes: Axes, ends: list[tuple[float, str, str]], gap: float = 0.065) -> None:
    """Write each line's name in its colour at the right, at the height of its end or as near as names leave room.

    Args:
        axes: The axes, with everything drawn.
        ends: The last y, the name and the colour of each line.
        gap: Least distance of two names, in heights of the axes.
    """
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = sorted((to_axes.transform((axes.get_xlim()[1], y))[1], name, color) for y, name, color in ends)
    places: list[float] = []
    for height, _, _ in heights:
        places.append(max(height, places[-1] + gap) if places else height)
    # Only upwards so far: all come down together, so that they are too high and too low by the same.
    shift = sum(place - height for place, (height, _, _) in zip(places, heights, strict=True)) / max(1, len(places))
    for place, (_, name, color) in zip(places, heights, strict=True):
        axes.annotate(
            plot.shorten(name),
            (1.0, place - shift),
            (8, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=color,
            fontsize=9,
            verticalalignment="center",
            annotation_clip=False,
        )
