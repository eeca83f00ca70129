"""From what a data set says of a picture to the caption that a training step uses."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

import torch

from train.data import generator

NAMES = ("text", "caption", "prompt")  # of fields that hold captions, the first that is there


def clean(texts: Sequence[str | None]) -> tuple[str, ...]:
    """The texts without blanks around them; empty ones are left out."""
    return tuple(t.strip() for t in texts if t and t.strip())


class Template:
    """A caption made of a row's fields, such as "a photo of {label}, {style}"; of a field that holds several texts, one
    caption for each."""

    def __init__(self, template: str):
        try:
            self.pieces = [(text, name, form, turn) for text, name, form, turn in Formatter().parse(template)]
        except ValueError as error:
            raise ValueError(f"--template {template!r}: {error}. A field is written as {{name}}") from None
        self.template = template
        self.names = list(dict.fromkeys(name for _, name, _, _ in self.pieces if name is not None))
        if not all(self.names) or any(form or turn for _, _, form, turn in self.pieces):
            raise ValueError(f"--template {template!r}: expected fields as {{name}}, without a number or a format")
        if not self.names:
            raise ValueError(f"--template {template!r} names no field: expected one at least, as {{name}}")

    def check(self, there: Iterable[str], where: str) -> None:
        """ValueError for a field that is not there."""
        there = sorted(there)
        if unknown := [name for name in self.names if name not in there]:
            raise ValueError(
                f"--template names {unknown[0]!r}, but the fields of {where} are {', '.join(there) or 'none'}"
            )

    def __call__(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """The captions of a row; none where one of its fields is empty."""
        choices = [_texts(fields.get(name)) for name in self.names]
        captions = []
        for chosen in itertools.product(*choices):
            words = dict(zip(self.names, chosen, strict=True))
            captions.append("".join(text + words.get(name or "", "") for text, name, _, _ in self.pieces))
        return clean(captions)


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return clean([str(one) for one in value if one is not None])
    return clean([str(value)])


def captions_of(fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Those of the first of `NAMES` that is there, a text or a list of texts; `where` begins an error's message."""
    text = next((fields[name] for name in NAMES if fields.get(name)), None)
    texts = text if isinstance(text, list) else [text or ""]
    if not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{where}: expected a text, or a list of texts, got {text!r}")
    return clean(texts)


def choose(group: Sequence[str], chance: Sequence[float], *, shuffle_tags: bool = False, keep_tags: int = 0) -> str:
    """One of a picture's captions, by chance[0], uniform in [0, 1).

    shuffle_tags: its comma-separated parts but the first `keep_tags` come in an order that is a function of `chance`.
    """
    caption = group[int(chance[0] * len(group))]
    if not shuffle_tags:
        return caption
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    rest = tags[keep_tags:]
    return ", ".join(tags[:keep_tags] + shuffled(rest, chance))


def shuffled(items: Sequence[str], chance: Sequence[float]) -> list[str]:
    """The items in an order that is a function of `chance`."""
    order = torch.randperm(len(items), generator=generator(*map(float, chance)))
    return [items[i] for i in order.tolist()]
