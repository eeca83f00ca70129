"""Shapes: captioned geometric scenes that need no download, for tests and first steps.

One shape of a size, a colour and perhaps a place, or two that stand in a relation. A caption that names the background
says all: there is one picture of it, so that a sample can be held beside what it should be.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from train.sources import Example

COLOURS = {  # name: sRGB, of shapes and of grounds
    "red": (214, 48, 49),
    "orange": (242, 140, 40),
    "yellow": (250, 211, 72),
    "green": (46, 160, 84),
    "blue": (45, 100, 214),
    "purple": (136, 72, 180),
    "pink": (246, 152, 190),
    "white": (248, 248, 246),
    "black": (32, 32, 36),
    "grey": (146, 150, 156),
}
_CLOSE = {  # too near to be told apart at a glance: never on nor beside one another
    frozenset(pair)
    for pair in (
        ("red", "orange"),
        ("orange", "yellow"),
        ("yellow", "white"),
        ("pink", "white"),
        ("grey", "white"),
        ("blue", "purple"),
        ("black", "purple"),
    )
}
KINDS = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
SIZES = {"small": 0.16, "": 0.25, "large": 0.4}  # name: half the shape's extent, in sides of the picture
PLACES = {  # name: centre (x, y), in sides of the picture
    "at the top left": (0.25, 0.25),
    "at the top right": (0.75, 0.25),
    "at the bottom left": (0.25, 0.75),
    "at the bottom right": (0.75, 0.75),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
}
RELATIONS = {  # "a FIRST is RELATION a SECOND": the direction from the second to the first
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
CANONICAL_PROMPTS = (
    "a large red circle on a white background",
    "a blue square on a yellow background",
    "a large yellow star on a blue background",
    "a green triangle on a pink background",
    "a small black heart at the top left on a white background",
    "a red circle left of a green square on a white background",
    "a yellow star above a purple ring on a black background",
    "a large white cross on a red background",
)
_OVERSAMPLE = 4


class Shape(NamedTuple):
    """What is drawn where; centre and radius in sides of the picture, the origin at the top left."""

    kind: str
    colour: str
    size: str
    centre: tuple[float, float]
    radius: float


class ShapeScene(NamedTuple):
    ground: str
    shapes: tuple[Shape, ...]
    captions: tuple[str, ...]


def _outline(kind: str) -> list[tuple[float, float]]:
    """Corners on the unit square [-1, 1]², y downwards."""
    if kind == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if kind == "diamond":
        return [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]
    if kind == "triangle":
        return [(0, -0.95), (1, 0.8), (-1, 0.8)]
    if kind == "cross":
        arm = 0.33
        quarter = [(arm, -1), (arm, -arm), (1, -arm)]
        return [point for k in range(4) for point in (_turned(p, k * np.pi / 2) for p in quarter)]
    if kind == "star":
        return [_turned((0, -(1.05 if k % 2 == 0 else 0.43)), k * np.pi / 5) for k in range(10)]
    t = np.linspace(0, 2 * np.pi, 97)[:-1]
    if kind == "heart":  # x = 16 sin³t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t (MathWorld, "Heart Curve"), over 16
        x = np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
        return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
    return [(float(np.cos(a)), float(np.sin(a))) for a in t]


def _turned(point: tuple[float, float], angle: float) -> tuple[float, float]:
    x, y = point
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return c * x - s * y, s * x + c * y


def draw(scene: ShapeScene, size: int) -> Image.Image:
    """The scene as an anti-aliased RGB picture of `size` × `size` pixels."""
    side = size * _OVERSAMPLE
    image = Image.new("RGB", (side, side), COLOURS[scene.ground])
    brush = ImageDraw.Draw(image)
    for shape in scene.shapes:
        x, y = (c * side for c in shape.centre)
        radius = shape.radius * side
        brush.polygon([(x + radius * u, y + radius * v) for u, v in _outline(shape.kind)], COLOURS[shape.colour])
        if shape.kind == "ring":
            brush.circle((x, y), 0.6 * radius, COLOURS[scene.ground])
    return image.resize((size, size), Image.Resampling.BOX)


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class Shapes:
    """Captioned scenes, map-style: `len(source)`, `source[i] -> Example`; row i is a pure function of (seed, i).

    Args:
        size: side of the pictures, pixels.
        count: number of rows.
        seed: another seed, other scenes.
    """

    def __init__(self, size: int = 64, count: int = 4096, seed: int = 0) -> None:
        self.size, self.count, self.seed = size, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        scene = self.scene(index)
        return Example(draw(scene, self.size), scene.captions, f"shapes/{self.seed}/{range(self.count)[index]}")

    def scene(self, index: int) -> ShapeScene:
        """What row `index` shows."""
        rng = np.random.default_rng([self.seed, range(self.count)[index]])
        ground = _choice(rng, list(COLOURS))
        kind, other = (KINDS[k] for k in rng.permutation(len(KINDS))[:2])
        colour = _choice(rng, _apart(ground))
        behind = f"on {_a(ground)} background"
        drawn = rng.random()
        if drawn < 0.6:  # one shape in the middle
            size = _choice(rng, list(SIZES))
            shapes = [Shape(kind, colour, size, (0.5, 0.5), SIZES[size])]
            named = _a(f"{size} {colour} {kind}".strip())
            lines = [f"{named} {behind}", named]
        elif drawn < 0.75:  # one shape in a place
            place = _choice(rng, list(PLACES))
            size = _choice(rng, ["small", ""])
            shapes = [Shape(kind, colour, size, PLACES[place], 0.95 * SIZES[size])]
            named = _a(f"{size} {colour} {kind}".strip())
            lines = [f"{named} {place} {behind}", f"{named} {place}"]
        else:  # two in a relation
            beside = _choice(rng, [name for name in _apart(ground) if name in _apart(colour)])
            relation = _choice(rng, list(RELATIONS))
            dx, dy = RELATIONS[relation]
            first = Shape(kind, colour, "", (0.5 + 0.25 * dx, 0.5 + 0.25 * dy), 0.22)
            second = Shape(other, beside, "", (0.5 - 0.25 * dx, 0.5 - 0.25 * dy), 0.22)
            shapes = [first, second]
            named = f"{_a(colour)} {kind} {relation} {_a(beside)} {other}"
            lines = [f"{named} {behind}", named]
        return ShapeScene(ground, tuple(shapes), tuple(lines))


def _choice(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _apart(colour: str) -> list[str]:
    """The colours that stand out against `colour`."""
    return [name for name in COLOURS if name != colour and frozenset((name, colour)) not in _CLOSE]
