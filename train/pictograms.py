"""Pictograms: every object of a colour emoji font, painted in six styles on eight grounds.

The font is Noto Color Emoji (SIL Open Font License); the objects and their names are in objects.csv beside this file.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.sources import Example
from train.styles import CELLS, PAINTERS, Scene

STYLES = {  # name: how a caption says it
    "plain": "a picture",
    "oil": "an oil painting",
    "pencil": "a pencil sketch",
    "watercolour": "a watercolour",
    "pixel": "pixel art",
    "glass": "a stained glass window",
}
GROUNDS = {  # name: sRGB
    "white": (247, 246, 242),
    "grey": (150, 154, 162),
    "red": (206, 66, 62),
    "yellow": (246, 206, 84),
    "green": (92, 166, 98),
    "blue": (80, 142, 214),
    "purple": (138, 96, 190),
    "pink": (244, 166, 196),
}
CANONICAL_PROMPTS = (
    "an oil painting of a fox on a blue background",
    "a watercolour of a boat on a yellow background",
    "a pencil sketch of a cat on a white background",
    "pixel art of a ghost on a green background",
    "a stained glass window of a butterfly on a purple background",
    "a picture of an apple on a grey background",
    "an oil painting of a house on a pink background",
    "a watercolour of an owl on a red background",
)
HELD_OUT_SHARE = 0.07
_FONT_FILE = "NotoColorEmoji.ttf"
_FONT_PIXELS = 109  # the one size the font's bitmaps have; glyphs are 136 × 128


class Thing(NamedTuple):
    """A line of objects.csv."""

    text: str  # what the font draws
    name: str
    article: str  # "a", "an", "the" or ""
    everyday: bool


class Row(NamedTuple):
    object: str
    style: str
    ground: str
    view: int


@lru_cache(maxsize=1)
def things() -> dict[str, Thing]:
    """The objects of objects.csv by name, in its order."""
    with open(Path(__file__).with_name("objects.csv"), encoding="utf-8", newline="") as file:
        rows = [
            Thing("".join(chr(int(code, 16)) for code in codes.split()), name, article, everyday == "1")
            for codes, name, article, everyday in list(csv.reader(file))[1:]
        ]
    return {thing.name: thing for thing in rows}


def _font_folders() -> list[Path]:
    home = Path.home()
    folders = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".local/share/fonts", home / ".fonts"]
    if sys.platform == "darwin":
        folders += [home / "Library/Fonts", Path("/Library/Fonts"), Path("/opt/homebrew/share/fonts")]
    return folders


@lru_cache(maxsize=8)
def find_font(font: str | os.PathLike[str] | None = None) -> Path:
    """The font's file: `font` itself, or the first found in the usual folders; ValueError where there is none."""
    if font is not None:
        if Path(font).is_file():
            return Path(font)
        raise ValueError(f"no font file at {str(font)!r}; give --font the path of {_FONT_FILE}")
    for folder in _font_folders():
        for path in sorted(folder.rglob(_FONT_FILE)):
            return path
    raise ValueError(
        f"{_FONT_FILE}, which draws the pictograms, is not installed: "
        f"run `apt-get install fonts-noto-color-emoji`, or give --font its path"
    )


@lru_cache(maxsize=2)
def _face(font: Path) -> ImageFont.FreeTypeFont:
    try:
        with open(font, "rb") as file:  # given a name that it can't open, Pillow would look for another font so named
            return ImageFont.truetype(file, _FONT_PIXELS)
    except OSError as error:
        raise ValueError(
            f"{font} can't be opened as a font of colour bitmaps ({error}); give --font {_FONT_FILE}"
        ) from error


@lru_cache(maxsize=2048)
def glyph(text: str, font: Path) -> Image.Image:
    """The font's picture of `text`, RGBA, cut to its own box; ValueError where the font has none."""
    face, drawn = _face(font), []
    for ground in ("black", "white"):  # drawn on a transparent ground, Pillow would count the coverage twice
        image = Image.new("RGB", (160, 160), ground)
        ImageDraw.Draw(image).text((8, 8), text, font=face, embedded_color=True)
        drawn.append(np.asarray(image, np.float32))
    cover = 255 - (drawn[1] - drawn[0]).min(-1, keepdims=True)
    colour = np.clip(255 * drawn[0] / np.maximum(cover, 1), 0, 255)
    mark = Image.fromarray(np.concatenate([colour, cover], -1).round().astype(np.uint8))
    box = mark.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"{font} draws nothing for {text!a}; install a newer fonts-noto-color-emoji, or give --font")
    return mark.crop(box)


def _known(kind: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, 3) or names[:8]
        raise ValueError(f"no {kind} is named {name!r}; expected a name such as {', '.join(map(repr, close))}")


def chosen(objects: str | Sequence[str] = "everyday") -> tuple[str, ...]:
    """The names of "everyday" or "all" objects, or those given, as a list or joined by commas; ValueError for unknown
    ones."""
    if objects in ("everyday", "all"):
        return tuple(name for name, thing in things().items() if objects == "all" or thing.everyday)
    names = objects.split(",") if isinstance(objects, str) else objects
    for name in names:
        _known("object", name, things())
    return tuple(dict.fromkeys(names))


def is_drawn(data: str) -> bool:
    """Whether a part of --data is drawn: "pictograms", or those of some objects."""
    return data.partition(":")[0] == "pictograms"


def objects_of(data: str) -> tuple[str, ...]:
    """The objects of "pictograms" or "pictograms:OBJECTS", as `--data` has it."""
    return chosen(data.partition(":")[2] or "everyday")


def _number(*words: object) -> int:
    """64 bits that depend on the words alone."""
    return int.from_bytes(hashlib.blake2b("|".join(map(str, words)).encode(), digest_size=8).digest(), "big")


def held_out(object: str, style: str) -> bool:
    """Whether the pair is kept from training, to see whether a model composes what it learnt apart."""
    return style != "plain" and _number("held out", object, style) < HELD_OUT_SHARE * 2**64


def paint(
    object: str, style: str, ground: str, size: int = 128, seed: int = 0, *, font: str | None = None
) -> Image.Image:
    """One picture, RGB, `size` × `size`; placement and brushwork depend on `seed` and on nothing else.

    object: a name in objects.csv; style: one of STYLES; ground: one of GROUNDS.
    Raises ValueError for a name that is none, or without the font.
    """
    for kind, name, names in (("object", object, things()), ("style", style, STYLES), ("ground", ground, GROUNDS)):
        _known(kind, name, names)
    rng = np.random.default_rng(seed)
    mark = glyph(things()[object].text, find_font(font))
    side = max(size, 128)
    scale, shift = rng.uniform(0.76, 0.84), rng.uniform(-0.03, 0.03, 2)
    step = side / CELLS if style == "pixel" else 1.0  # there, what is symmetric should fall on the grid so
    box = np.array(mark.size) * scale * side / max(mark.size)
    box = np.maximum(np.round(box / step), 1) * step
    left, top = np.round(((side - box) / 2 + shift * side) / step) * step
    # Colours stay multiplied by their coverage: dividing them out again would leave specks along the outline.
    mark = mark.convert("RGBa").resize((round(box[0]), round(box[1])), Image.Resampling.LANCZOS)
    layer = Image.new("RGBa", (side, side))
    layer.paste(mark, (round(left), round(top)))
    rgba = np.asarray(layer, np.float32) / 255
    cover = rgba[..., 3]
    backdrop = np.array(GROUNDS[ground], np.float32) / 255
    colour = np.clip(rgba[..., :3] + backdrop * (1 - cover[..., None]), 0, 1)
    painted = PAINTERS[style](Scene(colour, cover, backdrop, rng))
    image = Image.fromarray((np.clip(painted, 0, 1) * 255 + 0.5).astype(np.uint8))
    if size == side:
        return image
    return image.resize((size, size), Image.Resampling.NEAREST if style == "pixel" else Image.Resampling.LANCZOS)


def captions(object: str, style: str, ground: str) -> tuple[str, ...]:
    """All captions of a picture, the one with the most in it first."""
    thing = things()[object]
    named = f"{thing.article} {object}".strip()
    behind = f"on a {ground} background"
    phrases = [STYLES[style]]
    if style == "watercolour":
        phrases.append("a watercolor")
    lines = [f"{phrase} of {named} {behind}" for phrase in phrases] + [f"{phrase} of {named}" for phrase in phrases]
    if style == "plain":
        lines += [f"{named} {behind}", named]
    return tuple(lines)


class Pictograms:
    """Captioned pictograms, map-style: `len(source)`, `source[i] -> Example`.

    Row i is a pure function of `seed` and of what the row shows, whatever the process, the order or the other rows.

    Args:
        size: side of the pictures, pixels.
        objects: "everyday", "all", or names out of objects.csv, as a list or joined by commas.
        split: "train", "held_out" ((object, style) pairs kept from training), or "all".
        views: pictures of each object in each style on each ground, differing in placement and brushwork. None is
            mirrored: captions would not say so, and models that saw both ways paint teapots with two spouts.
        font: path of NotoColorEmoji.ttf; by default it is looked up where systems keep fonts.
        seed: another seed, other pictures.

    Raises:
        ValueError: an unknown object or split; no font.
    """

    def __init__(
        self,
        size: int = 128,
        objects: str | Sequence[str] = "everyday",
        split: str = "train",
        views: int = 1,
        font: str | None = None,
        seed: int = 0,
    ) -> None:
        if split not in ("train", "held_out", "all"):
            raise ValueError(f"split is {split!r}; expected 'train', 'held_out' or 'all'")
        find_font(font)
        self.size, self.font, self.seed = size, font, seed
        self.rows = [
            Row(name, style, ground, view)
            for name in chosen(objects)
            for style in STYLES
            if split == "all" or held_out(name, style) == (split == "held_out")
            for ground in GROUNDS
            for view in range(views)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        image = paint(*row[:3], self.size, _number(self.seed, *row), font=self.font)
        return Example(image, captions(*row[:3]), "/".join(map(str, row)))
