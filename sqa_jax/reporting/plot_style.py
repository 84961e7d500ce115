"""Matplotlib figures in one style, as SVG."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GRID = "#1f2933", "#d9dee4"


def axes_of(width: float, height: float) -> tuple[Figure, Axes]:
    """(figure, axes) of a figure with one plot.

    Args:
      width, height: in inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def svg(figure: Figure) -> str:
    """A figure as an SVG element; equal figures give equal text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "sqa_jax", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
