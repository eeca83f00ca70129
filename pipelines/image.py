"""The pictures that a call begins from: any of the types that a call returns, as one batch."""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

# What Pillow raises, and what its decoders let through.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def image_batch(
    image: Any, pictures: int, per_prompt: int, height: int | None, width: int | None, factor: int
) -> Tensor:
    """[pictures, 3, height, width] in [-1, 1].

    image: a PIL picture or a list of them, or what `output_type` "pt" and "np" are: [N, 3, H, W] or [N, H, W, 3] in
    [0, 1], N optional. One for all prompts, or one for each. Resized to height × width, by default to its own sides cut
    to multiples of `factor`.

    Raises ValueError for another type, another number of pictures, or several sizes without height and width.
    """
    batch = [part for one in (image if isinstance(image, list | tuple) else [image]) for part in _tensors(one)]
    prompts = pictures // per_prompt
    if len(batch) not in (1, prompts):
        raise ValueError(f"image: got {len(batch)} pictures for {prompts} prompts, expected one, or as many")
    sides = {tuple(one.shape[1:]) for one in batch}
    if len(sides) > 1 and (height is None or width is None):
        raise ValueError(f"image: got pictures of several sizes {sorted(sides)}: give height and width")
    own = sides.pop()
    size = [side if side is not None else o - o % factor for side, o in zip((height, width), own, strict=True)]
    if min(own) < factor and (height is None or width is None):
        raise ValueError(f"image: got {own[0]} × {own[1]} pixels, expected {factor} at least, or give height and width")
    if any(side < factor or side % factor for side in size):
        raise ValueError(f"height × width = {size[0]} × {size[1]}: expected multiples of {factor}")
    resized = [_resized(one, size) for one in batch]
    rows = resized * prompts if len(resized) == 1 else resized
    return torch.stack([one for one in rows for _ in range(per_prompt)])


def rgb(image: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF data says, transparency on white."""
    image = eight_bits(ImageOps.exif_transpose(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits in 8, which Pillow would clip at 255; others as they are. Numbers of mode I that are all
    below 256 are taken for 8 bits.

    Raises ValueError for numbers of which nothing says what is white.
    """
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return image
    grey = np.asarray(image)
    low, high = grey.min(), grey.max()
    most = 1 if image.mode == "F" else 65535
    if not (low >= 0 and high <= most):  # NaN, too
        raise ValueError(f"a picture with numbers from {low:g} to {high:g}: in mode {image.mode} expected 0 to {most}")
    if image.mode == "F":
        return Image.fromarray((grey * 255).round().astype(np.uint8))
    return Image.fromarray((grey if high < 256 and image.mode == "I" else grey >> 8).astype(np.uint8))


def trained_sides(
    image: Image.Image, size: int, multiple: int, width: int | None = None, height: int | None = None
) -> tuple[int, int]:
    """(width, height) in a picture's ratio, upright, multiples: what is given of them, or else of about as many pixels
    as a square of `size` has."""
    sides = ImageOps.exif_transpose(image).size
    scale = size / math.sqrt(sides[0] * sides[1])
    if width is not None or height is not None:
        scale = width / sides[0] if width is not None else (height or 0) / sides[1]
    wide, high = (max(1, round(side * scale / multiple)) * multiple for side in sides)
    return (wide if width is None else width), (high if height is None else height)


def _tensors(image: Any) -> Sequence[Tensor]:
    """Pictures as [3, H, W] in [-1, 1]."""
    if isinstance(image, Image.Image):
        pixels = torch.from_numpy(np.array(rgb(image)))
        return [pixels.permute(2, 0, 1).float() / 127.5 - 1]
    if isinstance(image, np.ndarray) and image.ndim in (3, 4) and image.shape[-1] == 3:
        image = torch.from_numpy(image).movedim(-1, -3)
    if not isinstance(image, Tensor) or image.ndim not in (3, 4) or image.shape[-3] != 3:
        got = tuple(image.shape) if hasattr(image, "shape") else type(image).__name__
        raise ValueError(f"image: got {got}, expected PIL pictures, or numbers [N, 3, H, W] or [N, H, W, 3] in [0, 1]")
    if not image.is_floating_point() or not (image.min() >= 0 and image.max() <= 1):  # nor is NaN
        raise ValueError("image: expected numbers in [0, 1], as output_type 'pt' and 'np' give them")
    return list((image.float() * 2 - 1).cpu().view(-1, *image.shape[-3:]))


def _resized(image: Tensor, size: list[int]) -> Tensor:
    if list(image.shape[1:]) == size:
        return image
    wider = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]
    return wider.clamp(-1, 1)
