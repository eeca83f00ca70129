"""What a judge learns from: pictures and, by task, what each shows; and how they are changed before it sees them."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from train.data import Pictures, read_pictures
from train.pictograms import Pictograms, Row, find_font, is_drawn, objects_of
from train.sources import Drawn, Source, classes_of, describe, open_source

GRAIN = 0.1  # standard deviation of the most noise that pictures are softened by, white being 1 and black -1
Tasks = tuple[tuple[str, tuple[str, ...]], ...]  # name of what is asked -> names of the answers


def drawings(data: str, size: int, views: int, font: str | None, seed: int) -> tuple[Source, list[Row]]:
    """Pictograms of all pairs, drawn otherwise than a generator is shown them (seed 0), and what each shows."""
    objects = objects_of(data)
    drawing = Pictograms(size, objects, "all", views, font, seed)
    said = f"pictograms {size} {','.join(objects)} all {views} seed {seed}"
    return Drawn(drawing, said, size, find_font(font)), drawing.rows


def read_answers(
    data: str,
    size: int,
    cache: Path,
    *,
    views: int,
    seed: int,
    font: str | None,
    workers: int,
    say: Callable[[str], None],
) -> tuple[Pictures, dict[str, list[str]]]:
    """Pictures and, by task, what each shows.

    views, seed: of drawn pictograms. Raises ValueError for captions that can't be classes.
    """
    if is_drawn(data):
        source, rows = drawings(data, size, views, font, seed)
        pictures = read_pictures(source, size, cache, workers=workers)
        return pictures, {"object": [row.object for row in rows], "style": [row.style for row in rows]}
    source = open_source(data, size, font=font)
    say(describe(source, size))
    classes_of(source)  # before the pictures are read, which may take long
    pictures = read_pictures(source, size, cache, workers=workers)
    return pictures, {"class": [group[0] for group in pictures.captions]}


def numbered(said: dict[str, list[str]], tasks: Tasks) -> Tensor:
    """[N, tasks]: the place of each picture's answer; ValueError for one that is not known."""
    columns = []
    for task, answers in tasks:
        place = {name: i for i, name in enumerate(answers)}
        if strange := set(said.get(task, ["nothing"])) - place.keys():
            raise ValueError(f"--test: {task} {min(strange)!r} is none of the {len(answers)} that --data has")
        columns.append(torch.tensor([place[name] for name in said[task]]))
    return torch.stack(columns, dim=1)


def augmented(images: Tensor, shift: int, flip: bool, draw: torch.Generator) -> Tensor:
    """Each picture moved by up to `shift` pixels, its border mirrored, and half of them from the other side."""
    count, side = len(images), images.shape[-1]
    offsets = torch.randint(2 * shift + 1, (count, 2), generator=draw)
    mirrored = torch.rand(count, generator=draw) < 0.5
    padded = F.pad(images, [shift] * 4, mode="reflect") if shift else images
    moved = torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, offsets.tolist(), strict=True)])
    return torch.where(mirrored[:, None, None, None], moved.flip(3), moved) if flip else moved


def softened(images: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """A share of the pictures out of focus (as if of fewer pixels, by up to a half) and grainy."""
    chosen = torch.rand(len(images), generator=draw) < share
    side = images.shape[-1]
    small = max(2, round(side * (1 - 0.5 * float(torch.rand((), generator=draw)))))
    blurred = F.interpolate(images, (small, small), mode="bilinear", antialias=True)
    blurred = F.interpolate(blurred, (side, side), mode="bicubic")
    grain = GRAIN * torch.rand(len(images), 1, 1, 1, generator=draw) * torch.randn(images.shape, generator=draw)
    return torch.where(chosen[:, None, None, None], (blurred + grain).clamp(-1, 1), images)
