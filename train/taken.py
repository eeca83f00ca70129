"""What the training loop asks of whoever feeds it, and what it gets."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from train.cache import Latents

VALIDATION = 256  # pictures held out, where there are enough


class Taken(NamedTuple):
    """The pictures at some positions of an update's global batch, all of one shape."""

    mean: Tensor  # [B, C, h, w] float32, with `logvar` the autoencoder's posterior
    logvar: Tensor
    captions: list[tuple[str, ...]]  # any of them may be used
    sizes: Tensor  # [B, 6] int64: original height and width, top and left of the crop, target height and width
    parts: Tensor  # [B] int64: which "+" part of --data each came from
    pixels: Tensor | None  # [B, 3, H, W] in [-1, 1], where the feed was opened with pixels=True


class Feed(Protocol):
    count: int | None  # pictures of an epoch, repeats included; None for a stream
    shapes: list[tuple[int, ...]]  # (C, h, w) of the latents that may come, the largest first
    captions: list[tuple[str, ...]]  # all, held-out pictures' included; of a stream only those

    def take(self, update: int, first: int, size: int, global_batch: int) -> Taken: ...

    def validation(self, number: int = VALIDATION) -> Latents:
        """Up to `number` pictures of one shape that training never sees (or, where there are too few, some it does)."""
        ...

    def state(self) -> dict[str, Any]:
        """Where a stream stands, or what a cached set is, fit for JSON; every process has to make this call."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is of another set."""
        ...

    def rehearsing(self) -> AbstractContextManager[None]:
        """Inside, batches have the largest shape that may come: what fits into memory then, fits ever after."""
        ...
