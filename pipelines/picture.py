"""A PIL picture that remembers how it was painted, and writes that into the PNG it is saved as."""

import itertools
import json
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] -> PIL; what is beyond is cut."""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def as_numbers(images: Tensor, kind: Literal["np", "pt"]) -> np.ndarray | Tensor:
    """[N, 3, H, W] in [-1, 1] -> float32 in [0, 1] in the computer's own memory: an array [N, H, W, 3] ("np"), or a
    tensor [N, 3, H, W] ("pt"), as diffusers has them; what is beyond is cut."""
    pixels = (images.float().clamp(-1, 1).cpu() + 1) / 2
    return pixels.permute(0, 2, 3, 1).numpy() if kind == "np" else pixels


class Picture(Image.Image):
    """`settings` (prompt, seed and so on) go into the text chunks "prompt", "seed" and "atelier" (all, as JSON)."""

    settings: dict[str, Any]

    @classmethod
    def of(cls, image: Image.Image, settings: dict[str, Any]) -> Self:
        picture = cls()
        picture.__setstate__([*image.__getstate__(), settings])  # PIL's own way to copy one into another object
        return picture

    def __getstate__(self) -> list[Any]:
        return [*super().__getstate__(), self.settings]

    def __setstate__(self, state: list[Any]) -> None:
        *state, self.settings = state
        super().__setstate__(state)

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As PIL's, but for a PNG, which carries the settings; a `pnginfo` of the caller's stays as it is."""
        name = str(getattr(fp, "name", "")) if hasattr(fp, "write") else str(fp)
        if (format or Path(name).suffix.lstrip(".")).lower() == "png" and "pnginfo" not in params:
            chunks = PngInfo()
            for key in ("prompt", "seed"):
                if self.settings.get(key) is not None:
                    chunks.add_itxt(key, str(self.settings[key]))
            chunks.add_itxt("atelier", json.dumps(self.settings, ensure_ascii=False, default=_plain))
            params["pnginfo"] = chunks
        super().save(fp, format, **params)


def _plain(value: Any) -> Any:
    """Of a setting that JSON does not know: NumPy's numbers as Python's, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def painted(
    images: Tensor, prompts: list[str], negatives: list[str], seeds: list[int] | None, settings: dict[str, Any]
) -> list[Picture]:
    """A batch [N, 3, H, W] in [-1, 1] as pictures, each with its prompts, its seed and the settings of the call."""
    rows = zip(images.cpu(), prompts, negatives, seeds or itertools.repeat(None), strict=False)
    return [
        Picture.of(to_pil(pixels), {"prompt": p, "negative_prompt": n, "seed": s, **settings})
        for pixels, p, n, s in rows
    ]
