"""The demo's one picture: how accuracy grew, who was taken for whom before and after, and what the crops look at.

Drawn with matplotlib's objects alone: no pyplot, no figure kept by the process. The colours are Okabe and Ito's, told
apart by colour-blind eyes; right and wrong differ in sign as well as in colour.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finealign.images import read_image
from finealign.types import Explanation

if TYPE_CHECKING:  # matplotlib takes a moment to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 16.0, 11.5, 100  # inches, and pixels an inch
EXAMPLES = 6  # images in the strip
NAMED_CLASSES = 48  # with more, names beside the matrices would run into one another
NAME_SHOWN, TICK_SHOWN = 10, 15  # characters of a class name below an image, and beside a matrix

BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#008560", "#A8487F", "#B57B00"
INK, FAINT = "#222222", "#6B6B6B"
RIGHT, WRONG = BLUE, VERMILION
STYLES: dict[str, tuple[str, str]] = {  # colour and line of each method
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
    """A test image whose label changed, and the crops the adapted model looks at; classes by their index."""

    path: Path
    explanation: Explanation
    before: int
    after: int
    truth: int


@dataclass(frozen=True, eq=False)
class Panels:
    """What is drawn. Accuracies are fractions in [0, 1]; confusions count images, a row a true class."""

    title: str
    note: str  # a line below the title
    classes: tuple[str, ...]
    curves: Mapping[str, Sequence[float]]  # by method: accuracy after epoch 0 (nothing learned), 1, 2, ...
    levels: Mapping[str, float]  # by method that learns nothing: its accuracy
    chance: float
    before: NDArray[np.int64]  # (C, C)
    after: NDArray[np.int64]  # (C, C)
    before_name: str
    after_name: str
    examples: Sequence[Example]
    strip: str  # the line above the images
    group: int | None = None  # classes that belong together stand side by side, so many at a time


def draw(panels: Panels) -> bytes:
    """The picture as PNG, ``WIDTH * DPI`` by ``HEIGHT * DPI`` pixels."""
    canvas: Any = compose(panels).canvas
    canvas.draw()
    png = BytesIO()
    # Not figure.savefig, whose size a user's matplotlibrc may change.
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(png, "PNG", optimize=True)
    return png.getvalue()


def compose(panels: Panels) -> "Figure":
    """The picture as a figure on an Agg canvas."""
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
        right = np.trace(confusion) / max(1, confusion.sum())
        _heading(figure, left, 1.32, name, f"{right:.1%} right; row: true class, column: label")
        _draw_confusion(_axes(figure, left, 1.85, 3.75, 3.75), confusion, panels, names_left=first)
    _legend(figure, 7.7, 6.75, panels.group)

    _heading(figure, 0.45, 7.35, "Labels that changed", panels.strip)
    _draw_strip(figure, panels)
    return figure


# --- places, in inches from the upper left corner ---------------------------------------------------------------------


def _axes(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    return figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))


def _write(figure: "Figure", left: float, top: float, text: str, **style: Any) -> None:
    # A dollar sign in a class name would start a formula.
    usual: dict[str, Any] = {"color": INK, "va": "center", "parse_math": False}
    figure.text(left / WIDTH, 1 - top / HEIGHT, text, **(usual | style))


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
    """Names right of the lines' ends, moved apart where lines end close together, with a hair to the line."""
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
                "relpos": (0, 0.5),  # from the name's left edge, or hairs would cross the names between
            },
            annotation_clip=False,
        )


def spread(places: Sequence[float], *, apart: float) -> list[float]:
    """Ascending ``places`` moved as little as it takes to stand at least ``apart`` from one another, around each knot's
    own middle; none below 0."""
    knots: list[list[float]] = []
    for place in places:
        knots.append([place])
        while len(knots) > 1 and _least(knots[-1], apart) < _least(knots[-2], apart) + len(knots[-2]) * apart:
            knots[-2:] = [knots[-2] + knots[-1]]
    return [_least(knot, apart) + apart * number for knot in knots for number in range(len(knot))]


def _least(knot: Sequence[float], apart: float) -> float:
    """Where the lowest of a knot's evenly spaced places lies."""
    return max(0.0, sum(knot) / len(knot) - apart * (len(knot) - 1) / 2)


# --- who is taken for whom --------------------------------------------------------------------------------------------


def _draw_confusion(axes: "Axes", confusion: NDArray[np.int64], panels: Panels, *, names_left: bool) -> None:
    count = len(panels.classes)
    axes.imshow(tinted(confusion), interpolation="nearest")
    axes.tick_params(colors=INK, labelsize=8, length=0, pad=2)
    named = count <= NAMED_CLASSES
    shown = [_shortened(name, TICK_SHOWN) for name in panels.classes] if named else []
    axes.set_yticks(range(count) if names_left and named else [], shown if names_left else [], parse_math=False)
    axes.set_xticks(range(count) if named else [], shown, rotation=90, parse_math=False)
    for spine in axes.spines.values():
        spine.set_color("#BBBBBB")
    if panels.group and count % panels.group == 0:
        for edge in range(panels.group, count, panels.group):
            axes.axhline(edge - 0.5, color="#C9C9C9", linewidth=0.8)
            axes.axvline(edge - 0.5, color="#C9C9C9", linewidth=0.8)


def tinted(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """(C, C) counts as colours (C, C, 3) in [0, 1]: blue on the diagonal, vermilion beside it, by the row's share."""
    from matplotlib.colors import to_rgb

    share = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    # Below one, so that the few images of a rare mistake can be seen.
    strength = (share**0.7)[..., None]
    full = np.where(np.eye(len(confusion), dtype=bool)[..., None], to_rgb(RIGHT), to_rgb(WRONG))
    return np.asarray(1 - strength * (1 - full), dtype=np.float64)


def _legend(figure: "Figure", left: float, top: float, group: int | None) -> None:
    together = f"; pale lines part groups of {group} that look alike" if group else ""
    for offset, colour, text in ((0.0, RIGHT, "right"), (0.85, WRONG, f"wrong; darker: more of its row{together}")):
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
    for place, example in enumerate(panels.examples[:EXAMPLES]):
        seen = example.explanation
        left = 0.45 + place * pitch
        axes = _axes(figure, left, top, side, side)
        axes.imshow(np.asarray(read_image(example.path)), interpolation="antialiased")
        axes.set_anchor("S")
        axes.set_axis_off()
        heaviness = relative(seen.weights)
        for number in np.argsort(heaviness, kind="stable"):
            (x0, y0, x1, y1), heavy = seen.boxes[number], float(heaviness[number])
            width, opacity = 0.7 + 1.9 * heavy, 0.35 + 0.65 * heavy
            border = Stroke(linewidth=width + 1.6, foreground="black", alpha=0.5 * opacity)
            axes.add_patch(
                Rectangle(
                    (x0 - 0.5, y0 - 0.5),
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
    """``before → after``, each in the colour of right or wrong, and the truth below."""
    from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea

    def part(text: str, colour: str) -> TextArea:
        return TextArea(text, textprops={"color": colour, "size": 10, "parse_math": False})

    def label(given: int) -> TextArea:
        right = given == example.truth
        return part(f"{'✓' if right else '✗'} {_shortened(classes[given], NAME_SHOWN)}", RIGHT if right else WRONG)

    packed = HPacker(children=[label(example.before), part("→", FAINT), label(example.after)], pad=0, sep=4)
    place = (middle / WIDTH, 1 - top / HEIGHT)
    figure.add_artist(AnnotationBbox(packed, place, xycoords="figure fraction", frameon=False))
    weights = example.explanation.weights
    least, most = float(weights.min(initial=1)), float(weights.max(initial=0))
    truth = f"truth: {_shortened(classes[example.truth], 2 * NAME_SHOWN)}"
    _write(figure, middle, top + 0.29, f"({truth})", size=10, ha="center")
    if len(weights):
        counts = f"{len(weights)} crops count {least:.1%} to {most:.1%} each"
        _write(figure, middle, top + 0.54, counts, size=9, ha="center", color=FAINT)


def relative(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N,) weights from the image's lightest, 0, to its heaviest, 1; all 1 where they are equal.

    A softmax over cosines hardly leaves evenness, so that shares themselves could not be told apart by eye; the
    caption gives the shares.
    """
    if not len(weights):
        return weights
    least, most = weights.min(), weights.max()
    return np.ones_like(weights) if most <= least else (weights - least) / (most - least)


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
