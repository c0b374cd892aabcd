"""The anatomy of a drawn bird: traits and a pose become coloured polygons, which a drawing style then paints.

Lengths are in body lengths. x points to where the bird looks, y points down, the origin is the middle of the body.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # (n, 2)
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (200, 40, 40),
    "orange": (235, 135, 35),
    "yellow": (240, 210, 60),
    "green": (70, 145, 70),
    "blue": (60, 100, 190),
    "violet": (130, 75, 165),
    "pink": (235, 150, 175),
    "brown": (125, 80, 45),
    "grey": (135, 140, 145),
    "black": (35, 35, 40),
    "white": (242, 240, 235),
}
PLUMAGE = tuple(COLOURS)
BILLS = ("red", "orange", "yellow", "blue", "black", "grey")


class Build(NamedTuple):
    """The proportions of a silhouette in body lengths; the tilt of the body in degrees, upwards."""

    height: float
    head: float  # diameter
    neck: float
    leg: float
    tilt: float


SILHOUETTES: dict[str, Build] = {
    "round": Build(height=0.82, head=0.44, neck=0.0, leg=0.2, tilt=12),
    "slender": Build(height=0.36, head=0.27, neck=0.05, leg=0.2, tilt=18),
    "stilt-legged": Build(height=0.44, head=0.26, neck=0.22, leg=0.72, tilt=10),
    "swan-necked": Build(height=0.5, head=0.24, neck=0.62, leg=0.16, tilt=0),
    "upright": Build(height=0.48, head=0.32, neck=0.04, leg=0.14, tilt=62),
    "big-headed": Build(height=0.5, head=0.58, neck=0.0, leg=0.16, tilt=20),
    "boat-shaped": Build(height=0.4, head=0.3, neck=0.16, leg=0.06, tilt=-4),
    "heavy-bodied": Build(height=0.66, head=0.3, neck=0.16, leg=0.36, tilt=6),
}
BEAKS = ("short", "long", "hooked", "curved", "broad")
CRESTS = ("none", "pointed", "fan", "curled")
WING_BARS = ("none", "one", "two")
EYE_RINGS = ("none", "white", "yellow", "red")
TAILS = ("short", "long", "forked", "fanned")
BREASTS = ("plain", "spotted", "banded")
LEGS = ("red", "orange", "yellow", "blue", "black", "pink")


@dataclass(frozen=True)
class Traits:
    """The traits that distinguish birds; ``VALUES`` lists the values that each field can have."""

    silhouette: str
    body: str
    wing: str
    belly: str
    cap: str
    beak: str
    beak_colour: str
    crest: str
    wing_bars: str
    eye_ring: str
    tail: str
    breast: str
    legs: str


VALUES: dict[str, tuple[str, ...]] = {
    "silhouette": tuple(SILHOUETTES),
    "body": PLUMAGE,
    "wing": PLUMAGE,
    "belly": PLUMAGE,
    "cap": PLUMAGE,
    "beak": BEAKS,
    "beak_colour": BILLS,
    "crest": CRESTS,
    "wing_bars": WING_BARS,
    "eye_ring": EYE_RINGS,
    "tail": TAILS,
    "breast": BREASTS,
    "legs": LEGS,
}


@dataclass(frozen=True)
class Pose:
    """How one bird stands: small changes to the proportions of its silhouette."""

    tilt: float = 0.0  # degrees, upwards
    neck: float = 0.0  # degrees, forwards
    stretch: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)  # factors on height, head, neck and leg
    gaze: float = 0.0  # degrees, downwards


@dataclass(frozen=True)
class Part:
    """One polygon: the part of the bird that it shows, the name of its colour, and its corners (n, 2)."""

    name: str
    colour: str
    points: Points


def random_traits(rng: np.random.Generator) -> Traits:
    """Random traits, each drawn independently of the others."""
    return Traits(**{name: str(rng.choice(values)) for name, values in VALUES.items()})


def random_pose(rng: np.random.Generator) -> Pose:
    """A random pose, within the range that suits every silhouette."""
    stretch = rng.uniform(0.9, 1.1, 4)
    return Pose(
        tilt=float(rng.uniform(-10, 10)),
        neck=float(rng.uniform(-15, 15)),
        stretch=(float(stretch[0]), float(stretch[1]), float(stretch[2]), float(stretch[3])),
        gaze=float(rng.uniform(-12, 12)),
    )


def anatomy(traits: Traits, pose: Pose) -> list[Part]:
    """The bird's polygons, in the order in which they are painted: from back to front."""
    build = SILHOUETTES[traits.silhouette]
    height, head, neck, leg = (value * factor for value, factor in zip(build[:4], pose.stretch, strict=True))
    along = _direction(-(build.tilt + pose.tilt))  # unit vector along the body, forwards
    down = np.array([-along[1], along[0]])
    parts = _legs(traits, leg, 0.42 * height * down - 0.04 * along)
    parts += _tail(traits, -0.42 * along, along, down)
    root = 0.34 * along - 0.22 * height * down
    centre = root + (neck + 0.3 * head) * _direction(-(62 + 0.3 * build.tilt) + pose.neck)
    parts += _crest(traits, centre, head)
    parts += _body(traits, along, down, height)
    if neck > 0:
        parts.append(Part("neck", traits.body, _taper(root + 0.04 * down, centre, 0.2 * height + 0.1, 0.7 * head)))
    parts += _wing(traits, along, down, height)
    parts += _head(traits, centre, head, pose.gaze)
    return parts


def _body(traits: Traits, along: Points, down: Points, height: float) -> list[Part]:
    middle = 0.0 * along
    parts = [
        Part("body", traits.body, _egg(middle, along, down, 0.5, height / 2)),
        Part("belly", traits.belly, _egg(0.05 * along + 0.2 * height * down, along, down, 0.36, 0.28 * height)),
    ]
    chest = 0.33 * along + 0.06 * height * down
    if traits.breast == "banded":
        across = _spine([chest - 0.3 * height * down, chest + 0.05 * along, chest + 0.34 * height * down])
        parts.append(Part("breast", _against(traits.belly, traits.body), _band(across, 0.075)))
    elif traits.breast == "spotted":
        for i, j in ((0, 0), (1, 0.4), (0, 0.8), (-1, 0.45), (-1, 1.1), (0.2, 1.5), (-1.7, 0.8)):
            spot = chest - 0.02 * along + 0.09 * i * along + 0.18 * height * j * down
            parts.append(Part("breast", _against(traits.belly, traits.body), _ellipse(spot, 0.03, 0.03)))
    return parts


def _wing(traits: Traits, along: Points, down: Points, height: float) -> list[Part]:
    shoulder = 0.2 * along - 0.1 * height * down
    tip = -0.5 * along + 0.02 * height * down
    upper = -0.26 * height * down
    lower = 0.24 * height * down
    edge = [shoulder, shoulder * 0.6 + tip * 0.4 + upper, tip, shoulder * 0.55 + tip * 0.45 + lower]
    parts = [Part("wing", traits.wing, _closed(edge))]
    colour = "black" if traits.wing in ("white", "yellow", "grey") else "white"
    for number in range({"none": 0, "one": 1, "two": 2}[traits.wing_bars]):
        middle = shoulder * (0.72 - 0.3 * number) + tip * (0.28 + 0.3 * number)
        bar = _spine([middle + 0.66 * upper, middle - 0.03 * along, middle + 0.66 * lower])
        parts.append(Part("wing bar", colour, _band(bar, 0.06)))
    return parts


def _head(traits: Traits, centre: Points, head: float, gaze: float) -> list[Part]:
    radius = head / 2
    look = _direction(gaze)
    below = np.array([-look[1], look[0]])
    parts = _beak(traits, centre + 0.85 * radius * look, look, below, radius)
    parts.append(Part("head", traits.body, _ellipse(centre, radius, 0.94 * radius)))
    angles = np.radians(np.linspace(198, 345, 12))
    crown = centre + radius * (np.cos(angles)[:, None] * look + 0.94 * np.sin(angles)[:, None] * below)
    parts.append(Part("cap", traits.cap, crown))
    eye = centre + radius * (0.34 * look - 0.02 * below)
    if traits.eye_ring != "none":
        ring = 0.115 + 0.06 * head
        parts.append(Part("eye ring", traits.eye_ring, _ellipse(eye, ring * 0.72, ring * 0.72)))
    parts.append(Part("eye", "black", _ellipse(eye, 0.055, 0.055)))
    parts.append(Part("glint", "white", _ellipse(eye + np.array([0.018, -0.02]), 0.018, 0.018)))
    return parts


def _beak(traits: Traits, root: Points, look: Points, below: Points, radius: float) -> list[Part]:
    def at(forward: float, downward: float) -> Points:
        return root + forward * look + downward * below

    half = 0.1 + 0.12 * radius
    shape = {
        "short": [at(-0.04, -half), at(0.2, 0.02), at(-0.04, half)],
        "long": [at(-0.04, -0.8 * half), at(0.56, 0.0), at(-0.04, 0.8 * half)],
        "hooked": [
            at(-0.04, -half),
            at(0.2, -0.9 * half),
            at(0.32, 0.2 * half),
            at(0.28, 2.1 * half),
            at(0.17, 0.8 * half),
            at(-0.04, half),
        ],
        "curved": [
            at(-0.04, -0.9 * half),
            at(0.24, -0.3 * half),
            at(0.44, 1.2 * half),
            at(0.5, 2.7 * half),
            at(0.33, 1.7 * half),
            at(0.18, 0.8 * half),
            at(-0.04, 0.7 * half),
        ],
        "broad": [
            at(-0.04, -0.8 * half),
            at(0.2, -0.6 * half),
            at(0.34, -1.5 * half),
            at(0.46, -0.9 * half),
            at(0.46, 0.9 * half),
            at(0.34, 1.5 * half),
            at(0.2, 0.6 * half),
            at(-0.04, 0.8 * half),
        ],
    }[traits.beak]
    return [Part("beak", traits.beak_colour, np.array(shape))]


def _crest(traits: Traits, centre: Points, head: float) -> list[Part]:
    radius = head / 2
    top = centre + np.array([-0.1, -0.8]) * radius
    back = centre + np.array([-0.8, -0.45]) * radius
    if traits.crest == "pointed":
        tip = centre - np.array([radius + 0.26, radius + 0.2])
        return [Part("crest", traits.cap, np.array([top + np.array([0.08, 0]), tip, back]))]
    if traits.crest == "fan":
        spread = [
            centre + (radius + reach) * _direction(angle)
            for angle, reach in zip(range(-165, -45, 15), [0.12, 0.26, 0.15, 0.29, 0.17, 0.29, 0.15, 0.22], strict=True)
        ]
        return [Part("crest", traits.cap, np.array([centre, *spread]))]
    if traits.crest == "curled":
        steps = np.array([[0.02, 0.06], [-0.02, -0.22], [0.14, -0.36], [0.28, -0.24], [0.22, -0.12]])
        plume = list(top + steps)
        return [Part("crest", traits.cap, _band(_spine(plume), 0.07))]
    return []


def _tail(traits: Traits, root: Points, along: Points, down: Points) -> list[Part]:
    def at(backward: float, downward: float) -> Points:
        return root - backward * along + downward * down

    shape = {
        "short": [at(-0.1, -0.1), at(0.2, -0.09), at(0.2, 0.05), at(-0.1, 0.1)],
        "long": [at(-0.1, -0.1), at(0.68, -0.06), at(0.7, 0.05), at(-0.1, 0.1)],
        "forked": [at(-0.1, -0.1), at(0.52, -0.26), at(0.24, -0.01), at(0.52, 0.2), at(-0.1, 0.1)],
        "fanned": [
            at(-0.1, -0.08),
            at(0.26, -0.34),
            at(0.4, -0.2),
            at(0.44, 0.0),
            at(0.4, 0.18),
            at(0.26, 0.3),
            at(-0.1, 0.08),
        ],
    }[traits.tail]
    return [Part("tail", traits.wing, np.array(shape))]


def _legs(traits: Traits, leg: float, hip: Points) -> list[Part]:
    parts = []
    for offset in (-0.07, 0.09):
        start = hip + np.array([offset, -0.06])
        foot = start + np.array([0.02, leg + 0.1])
        parts.append(Part("leg", traits.legs, _band(_spine([start, foot]), 0.05)))
        toes = foot + np.array([[-0.05, 0.0], [0.13, 0.02]])
        parts.append(Part("foot", traits.legs, _band(toes, 0.05)))
    return parts


def _against(below: str, around: str) -> str:
    """Black or white, whichever contrasts with both colours."""
    brightness = sum(sum(COLOURS[name]) for name in (below, around)) / 2
    return "black" if brightness > 330 else "white"


def _direction(degrees: float) -> Points:
    return np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


_CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 24, False)), np.sin(np.linspace(0, 2 * np.pi, 24, False))], 1)


def _ellipse(centre: Points, width: float, height: float) -> Points:
    return np.asarray(centre + _CIRCLE * [width, height])


def _egg(centre: Points, along: Points, down: Points, half_length: float, half_height: float) -> Points:
    """An ellipse along the body that is higher in front."""
    forward, downward = _CIRCLE[:, :1], _CIRCLE[:, 1:]
    return np.asarray(centre + half_length * forward * along + half_height * downward * (1 + 0.16 * forward) * down)


def _taper(start: Points, end: Points, width_start: float, width_end: float) -> Points:
    across = end - start
    normal = np.array([-across[1], across[0]]) / (np.linalg.norm(across) + 1e-9) / 2
    return np.array(
        [start + width_start * normal, end + width_end * normal, end - width_end * normal, start - width_start * normal]
    )


def _spine(knots: list[Points]) -> Points:
    """A smooth line through two or more points."""
    known = np.array(knots)
    if len(known) == 2:
        return known
    steps = np.linspace(0, len(known) - 1, 4 * len(known))
    # Straight between the knots, then smoothed: at these sizes it looks like a spline.
    line = np.stack([np.interp(steps, range(len(known)), known[:, axis]) for axis in (0, 1)], 1)
    line[1:-1] = (line[:-2] + 2 * line[1:-1] + line[2:]) / 4
    return line


def _band(spine: Points, width: float) -> Points:
    step = np.gradient(spine, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], 1)
    normal *= width / 2 / (np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9)
    return np.concatenate([spine + normal, (spine - normal)[::-1]])


def _closed(knots: list[Points]) -> Points:
    """A closed outline near the knots, with its corners rounded."""
    points = np.array(knots)
    for _ in range(2):  # Chaikin's corner cutting
        following = np.roll(points, -1, axis=0)
        points = np.stack([0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following], 1).reshape(-1, 2)
    return points
