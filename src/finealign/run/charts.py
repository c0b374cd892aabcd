"""Charts as SVG for an HTML page: drawn by matplotlib, coloured by the page's CSS variables to follow its theme."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # matplotlib takes a moment to import
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 3.6, 2.3  # inches: the width of a phone's screen
# Placeholder colours: matplotlib cannot draw in CSS variables, so ``_themed`` puts these variables in their place.
INK, LINE, BEFORE, AFTER = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "--faint", LINE: "--line", BEFORE: "--before", AFTER: "--after"}


@dataclass(frozen=True)
class Curve:
    """One line of a chart. The start's line also differs in dashes and markers, not in colour alone."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    start: bool = False  # whether the line is of the start, the model before adaptation


def by_epoch(curves: Sequence[Curve], *, name: str, percent: bool = False) -> str:
    """Draw curves over epochs and return the SVG element.

    ``percent``: values are fractions, shown in percent on an axis that begins at 0. ``name`` must differ between the
    charts of a page: the ids inside the SVG are derived from it.
    """

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        for curve in curves:
            axes.plot(curve.x, curve.y, **_look(curve))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        if percent:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    return _svg(draw, name)


def calibration(curves: Sequence[Curve], *, name: str) -> str:
    """Draw accuracy over confidence, both in [0, 1], and return the SVG element.

    On the diagonal, accuracy equals confidence. ``name`` must differ between the charts of a page.
    """

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import PercentFormatter

        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
        for curve in curves:
            axes.plot(curve.x, curve.y, **_look(curve))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="how sure", ylabel="how often right")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))

    return _svg(draw, name)


def _look(curve: Curve) -> dict[str, Any]:
    if curve.start:
        return {"color": BEFORE, "linestyle": "--", "marker": "s", "markersize": 4, "linewidth": 1.6}
    return {"color": AFTER, "linestyle": "-", "marker": "o", "markersize": 4, "linewidth": 1.8}


def _svg(draw: Any, name: str) -> str:
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The default style makes the chart independent of the user's matplotlibrc. Text stays text, for screen readers and
    # the page's font. The salt makes the ids differ from those of the page's other charts.
    with style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}]):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_color(LINE)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        axes.tick_params(colors=INK, length=0)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        svg = StringIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(svg, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _themed(svg.getvalue())


def _themed(svg: str) -> str:
    """The ``<svg>`` element alone, without a fixed size, in the page's colours and fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z0-9]+(\.[a-z]+)?_\d+"', "", svg)  # unused, and the same in every chart
    svg = re.sub(r'(?<=<svg)[^>]*?(viewBox="[^"]*")[^>]*', r' xmlns:xlink="http://www.w3.org/1999/xlink" \1', svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg", '<svg aria-hidden="true" style="stroke-linejoin: round"', 1).strip()
