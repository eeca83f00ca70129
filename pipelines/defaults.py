"""What a call takes when nothing is said: the entries of a model's atelier.json, which a LoRA's header may change."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from ldm.samplers import SAMPLERS


@dataclass(frozen=True)
class Defaults:
    """What a call takes when nothing is said, and what training left for the reader: atelier.json."""

    steps: int = 50
    guidance_scale: float = 7.5
    guidance_interval: tuple[float, float] | None = None  # in sigma
    sampler: str = ""  # "" takes the one of the scheduler's name
    size: int | None = None  # side in pixels; None: the network's own
    caption_dropout: float | None = None  # None: not recorded
    data: str = ""  # what it was trained on
    views: int = 1  # how often each drawn pictogram was drawn for that


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_interval(value: Any) -> bool:
    """A noise level and a higher one, which may be infinite."""
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(level, Real) for level in value)
    return pair and value[0] < value[1]


EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (_count, "a whole number, at least 1"),
    "guidance_scale": (_number, "a number"),
    "guidance_interval": (lambda value: value is None or is_interval(value), "two noise levels, or null"),
    "sampler": (lambda value: value in ("", *SAMPLERS), f"one of {', '.join(SAMPLERS)}"),
    "size": (lambda value: value is None or _count(value), "a whole number of pixels, or null"),
    "caption_dropout": (lambda value: value is None or _number(value), "a number, or null"),
    "data": (lambda value: isinstance(value, str), "a text"),
    "views": (_count, "a whole number, at least 1"),
}


def read_defaults(said: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The entries that are fields of `Defaults`, in their types; ValueError naming the file for any other."""
    found = {field.name: said[field.name] for field in fields(Defaults) if field.name in said}
    for name, value in found.items():
        fits, expected = EXPECTED[name]
        if not fits(value):
            raise ValueError(f"{file}: {name} is {value!r}, expected {expected}")
    if found.get("guidance_interval"):
        found["guidance_interval"] = tuple(found["guidance_interval"])
    return found
