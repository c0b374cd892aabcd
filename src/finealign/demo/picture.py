"""The demo's picture: accuracy by epoch, confusion matrices before and after adaptation, and the crops of some images.

Drawn with matplotlib's objects alone, without pyplot, so that no figure stays registered in the process. The colours
are based on Okabe and Ito's palette, which colour-blind readers can tell apart; right and wrong also differ by a sign.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finealign.images.decoding import read_image
from finealign.types import Explanation

if TYPE_CHECKING:  # matplotlib takes a moment to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 16.0, 11.5, 100  # inches, and pixels an inch
EXAMPLES = 6  # images in the strip of examples
NAMED_CLASSES = 48  # with more classes, the names beside the matrices would overlap and are left out
NAME_SHOWN, TICK_SHOWN = 10, 15  # most characters of a class name below an image, and beside a matrix

BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#008560", "#A8487F", "#B57B00"
INK, FAINT = "#222222", "#6B6B6B"
RIGHT, WRONG = BLUE, VERMILION
STYLES: dict[str, tuple[str, str]] = {  # colour and line style of each method
    "fair": (BLUE, "-"),
    "self-training": (VERMILION, "-"),
    "wca": (PURPLE, "--"),
    "cupl": (GREEN, "-."),
    "zero-shot": (ORANGE, ":"),
    "chance": (FAINT, ":"),
}
MARKERS = {"fair": "o", "self-training": "s"}


@dataclass(frozen=True, eq=False)
class Example:
    """A test image whose label changed.

    ``before``, ``after`` and ``truth`` are class indices: the start's label, the adapted model's, and the true one.
    ``explanation`` has the adapted model's crops.
    """

    path: Path
    explanation: Explanation
    before: int
    after: int
    truth: int


@dataclass(frozen=True, eq=False)
class Panels:
    """What the picture shows. Accuracies are fractions in [0, 1]; confusions count images, one row per true class."""

    title: str
    note: str  # a line below the title
    classes: tuple[str, ...]
    curves: Mapping[str, Sequence[float]]  # by method: accuracy after epoch 0 (nothing learned), 1, 2, ...
    levels: Mapping[str, float]  # accuracy of each method that learns nothing
    chance: float  # accuracy of guessing
    before: NDArray[np.int64]  # (C, C)
    after: NDArray[np.int64]  # (C, C)
    before_name: str
    after_name: str
    examples: Sequence[Example]
    strip: str  # the line above the examples
    group: int | None = None  # size of the groups of similar classes; the classes of a group are adjacent


def draw(panels: Panels) -> bytes:
    """Draw the picture and return it as PNG, of ``WIDTH * DPI`` by ``HEIGHT * DPI`` pixels."""
    canvas: Any = compose(panels).canvas
    canvas.draw()
    png = BytesIO()
    # figure.savefig is not used, because a user's matplotlibrc may change its size.
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(png, "PNG", optimize=True)
    return png.getvalue()


def compose(panels: Panels) -> "Figure":
    """The picture as a matplotlib figure on an Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    _write(figure, 0.45, 0.42, panels.title, size=17, weight="bold")
    _write(figure, 0.45, 0.76, panels.note, size=11, color=FAINT)

    _heading(figure, 0.45, 1.32, "Accuracy on the test images", "top-1 after each epoch; at 0 nothing is learned")
    _draw_curves(_axes(figure, 1.0, 1.9, 3.75, 4.55), panels)

    for left, name, confusion, first in (
        (7.7, panels.before_name, panels.before, True),
        (11.95, panels.after_name, panels.after, False),
    ):
        accuracy = np.trace(confusion) / max(1, confusion.sum())
        _heading(figure, left, 1.32, name, f"{accuracy:.1%} right; row: true class, column: label")
        _draw_confusion(_axes(figure, left, 1.85, 3.75, 3.75), confusion, panels, names_left=first)
    _legend(figure, 7.7, 6.75, panels.group)

    _heading(figure, 0.45, 7.35, "Labels that changed", panels.strip)
    _draw_strip(figure, panels)
    return figure


# --- places, in inches from the upper left corner ---------------------------------------------------------------------


def _axes(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    return figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))


def _write(figure: "Figure", left: float, top: float, text: str, **style: Any) -> None:
    # Without parse_math=False, a dollar sign in a class name would start a formula.
    defaults: dict[str, Any] = {"color": INK, "va": "center", "parse_math": False}
    figure.text(left / WIDTH, 1 - top / HEIGHT, text, **(defaults | style))


def _heading(figure: "Figure", left: float, top: float, text: str, below: str) -> None:
    _write(figure, left, top, text, size=13, weight="bold")
    _write(figure, left, top + 0.26, below, size=10, color=FAINT)


# --- accuracy by epoch ------------------------------------------------------------------------------------------------


def _draw_curves(axes: "Axes", panels: Panels) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max([1, *(len(curve) - 1 for curve in panels.curves.values())])
    ends: dict[str, float] = {}
    for name, level in {**panels.levels, "chance": panels.chance}.items():
        colour, line = STYLES.get(name, (INK, "--"))
        axes.axhline(level, color=colour, linestyle=line, linewidth=1.6, zorder=1)
        ends[name] = level
    for name, curve in panels.curves.items():
        colour, line = STYLES.get(name, (INK, "-"))
        marker = MARKERS.get(name, "o")
        axes.plot(range(len(curve)), curve, color=colour, linestyle=line, linewidth=2.4, marker=marker, markersize=6)
        ends[name] = curve[-1]
    axes.set_xlim(-0.02 * last, last * 1.02)
    top = min(1.0, max(ends.values(), default=1.0) * 1.12 + 0.02)
    highest = max(top, *(max(curve, default=0.0) for curve in panels.curves.values()), panels.chance)
    axes.set_ylim(0, highest)
    step = max(1, round(last / 6))
    axes.set_xticks(range(0, last + 1, step))
    levels = [level for level in MaxNLocator(8).tick_values(0, highest) if 0 <= level <= highest]
    axes.set_yticks(levels, [f"{100 * level:.3g}%" for level in levels])
    axes.set_xlabel("epoch", color=FAINT, fontsize=10)
    axes.tick_params(colors=FAINT, labelsize=10, length=3)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#BBBBBB")
    _name_lines(axes, ends, highest)


def _name_lines(axes: "Axes", ends: Mapping[str, float], highest: float) -> None:
    """Write each name to the right of its line's end and connect them; names that would overlap are moved apart."""
    names = sorted(ends, key=lambda name: ends[name])
    places = spread([ends[name] / highest for name in names], apart=0.052)
    for name, place in zip(names, places, strict=True):
        colour = STYLES.get(name, (INK, ""))[0]
        axes.annotate(
            f"{name} {ends[name]:.1%}",
            xy=(1.0, ends[name] / highest),
            xytext=(1.09, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=11,
            fontweight="bold" if name in MARKERS else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "shrinkA": 2,
                "shrinkB": 0,
                "relpos": (0, 0.5),  # start at the name's left edge, so that no connector crosses another name
            },
            annotation_clip=False,
        )


def spread(places: Sequence[float], *, apart: float) -> list[float]:
    """Move ascending ``places`` until neighbours are at least ``apart`` from one another, and none is below 0.

    Places that are too close form a group, which is spaced evenly around its mean; the others stay where they are.
    Returns the new places in the same order.
    """
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _least(groups[-1], apart) < _least(groups[-2], apart) + len(groups[-2]) * apart:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_least(group, apart) + apart * number for group in groups for number in range(len(group))]


def _least(group: Sequence[float], apart: float) -> float:
    """The lowest place of a group after it is spaced evenly around its mean."""
    return max(0.0, sum(group) / len(group) - apart * (len(group) - 1) / 2)


# --- confusion matrices -----------------------------------------------------------------------------------------------


def _draw_confusion(axes: "Axes", confusion: NDArray[np.int64], panels: Panels, *, names_left: bool) -> None:
    count = len(panels.classes)
    axes.imshow(tinted(confusion), interpolation="nearest")
    axes.tick_params(colors=INK, labelsize=8, length=0, pad=2)
    named = count <= NAMED_CLASSES
    labels = [_shortened(name, TICK_SHOWN) for name in panels.classes] if named else []
    axes.set_yticks(range(count) if names_left and named else [], labels if names_left else [], parse_math=False)
    axes.set_xticks(range(count) if named else [], labels, rotation=90, parse_math=False)
    for spine in axes.spines.values():
        spine.set_color("#BBBBBB")
    if panels.group and count % panels.group == 0:
        for edge in range(panels.group, count, panels.group):
            axes.axhline(edge - 0.5, color="#C9C9C9", linewidth=0.8)
            axes.axvline(edge - 0.5, color="#C9C9C9", linewidth=0.8)


def tinted(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """The (C, C) counts as RGB colours (C, C, 3) in [0, 1]: blue on the diagonal, vermilion elsewhere.

    The larger a cell's share of its row, the darker its colour.
    """
    from matplotlib.colors import to_rgb

    share = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    # An exponent below 1 keeps rare mistakes visible.
    strength = (share**0.7)[..., None]
    full = np.where(np.eye(len(confusion), dtype=bool)[..., None], to_rgb(RIGHT), to_rgb(WRONG))
    return np.asarray(1 - strength * (1 - full), dtype=np.float64)


def _legend(figure: "Figure", left: float, top: float, group: int | None) -> None:
    groups = f"; pale lines part groups of {group} that look alike" if group else ""
    for offset, colour, text in ((0.0, RIGHT, "right"), (0.85, WRONG, f"wrong; darker: more of its row{groups}")):
        _write(figure, left + offset, top, "■", size=12, color=colour)
        _write(figure, left + offset + 0.2, top, text, size=10, color=FAINT)


# --- the strip --------------------------------------------------------------------------------------------------------


def _draw_strip(figure: "Figure", panels: Panels) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Stroke

    if not panels.examples:
        _write(figure, 0.45, 8.2, "None: every test image kept its label.", size=11)
        return
    pitch, side, top = (WIDTH - 0.9) / EXAMPLES, 2.4, 7.95
    for column, example in enumerate(panels.examples[:EXAMPLES]):
        explanation = example.explanation
        left = 0.45 + column * pitch
        axes = _axes(figure, left, top, side, side)
        axes.imshow(np.asarray(read_image(example.path)), interpolation="antialiased")
        axes.set_anchor("S")
        axes.set_axis_off()
        weights = relative(explanation.weights)
        for number in np.argsort(weights, kind="stable"):  # the heaviest crop is drawn last, on top of the others
            (x0, y0, x1, y1), weight = explanation.boxes[number], float(weights[number])
            width, opacity = 0.7 + 1.9 * weight, 0.35 + 0.65 * weight
            border = Stroke(linewidth=width + 1.6, foreground="black", alpha=0.5 * opacity)
            axes.add_patch(
                Rectangle(
                    (x0 - 0.5, y0 - 0.5),  # matplotlib puts the centre of the first pixel at 0
                    x1 - x0,
                    y1 - y0,
                    fill=False,
                    edgecolor="white",
                    linewidth=width,
                    alpha=opacity,
                    path_effects=[border, Stroke(linewidth=width, foreground="white", alpha=opacity)],
                )
            )
        _caption(figure, left + side / 2, top + side + 0.24, example, panels.classes)


def _caption(figure: "Figure", middle: float, top: float, example: Example, classes: Sequence[str]) -> None:
    """Write ``before → after``, each in the colour of right or wrong, and the true class below."""
    from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea

    def part(text: str, colour: str) -> TextArea:
        return TextArea(text, textprops={"color": colour, "size": 10, "parse_math": False})

    def label(index: int) -> TextArea:
        right = index == example.truth
        return part(f"{'✓' if right else '✗'} {_shortened(classes[index], NAME_SHOWN)}", RIGHT if right else WRONG)

    packed = HPacker(children=[label(example.before), part("→", FAINT), label(example.after)], pad=0, sep=4)
    place = (middle / WIDTH, 1 - top / HEIGHT)
    figure.add_artist(AnnotationBbox(packed, place, xycoords="figure fraction", frameon=False))
    weights = example.explanation.weights
    lowest, highest = float(weights.min(initial=1)), float(weights.max(initial=0))
    truth = f"truth: {_shortened(classes[example.truth], 2 * NAME_SHOWN)}"
    _write(figure, middle, top + 0.29, f"({truth})", size=10, ha="center")
    if len(weights):
        counts = f"{len(weights)} crops count {lowest:.1%} to {highest:.1%} each"
        _write(figure, middle, top + 0.54, counts, size=9, ha="center", color=FAINT)


def relative(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """An image's crop weights (N,) scaled to [0, 1], from its lowest weight to its highest; all 1 where they are equal.

    The weights come from a softmax over cosines and are almost even, so their differences could not be seen unscaled;
    the caption gives the original weights.
    """
    if not len(weights):
        return weights
    lowest, highest = weights.min(), weights.max()
    return np.ones_like(weights) if highest <= lowest else (weights - lowest) / (highest - lowest)


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
