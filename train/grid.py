"""Pictures beside one another, with their captions: what people look at instead of a loss."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST = 64  # pixels that a side of a tile has at least, so that people see it and captions fit under it


def grid(pictures: Sequence[Image.Image | np.ndarray], captions: Sequence[str] = (), *, columns: int) -> Image.Image:
    """One picture of many, row by row, each over its caption; those under SMALLEST pixels enlarged, as squares."""
    tiles = [p if isinstance(p, Image.Image) else Image.fromarray(p) for p in pictures]
    scale = -(-SMALLEST // min(SMALLEST, *tiles[0].size))
    width, height = scale * tiles[0].width, scale * tiles[0].height
    font = ImageFont.load_default(10)
    wrapped = ["\n".join(textwrap.wrap(c, max(8, width // 5))[:4]) for c in captions]
    strip = 12 * max((w.count("\n") + 1 for w in wrapped), default=0) + (4 if wrapped else 0)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + 4) + 4, rows * (height + strip + 4) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x, y = 4 + i % columns * (width + 4), 4 + i // columns * (height + strip + 4)
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if i < len(wrapped):
            draw.multiline_text((x, y + height + 2), wrapped[i], fill="black", font=font, spacing=1)
    return sheet
