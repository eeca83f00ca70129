"""From captions of any length to hidden states: what every text encoder shares, whatever its tower and tokenizer."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from conditioning.context import Context, checked

LongPrompts = Literal["chunks", "cut"]


class Tokenizer(Protocol):
    """Text to ids and back; `prefix` and `suffix` are the ids that every window begins and ends with."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class TextEncoder(nn.Module, ABC):
    """Captions in, `encoder_hidden_states` [B, chunks * L, D] out, L = `length` tokens being what the tower reads.

    A caption over L tokens is read in windows that each have their own start and end token, and the hidden states of
    the windows follow one another ("chunks"); or it is cut, and a warning shows what was lost ("cut"). The shorter
    captions of a batch are filled up with windows of the empty caption.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, long_prompts: LongPrompts = "chunks"):
        super().__init__()
        if long_prompts not in get_args(LongPrompts):
            raise ValueError(f"long_prompts: got {long_prompts!r}, expected one of {get_args(LongPrompts)}")
        self.tokenizer, self.length, self.long_prompts = tokenizer, length, long_prompts
        self.room = length - len(tokenizer.prefix) - len(tokenizer.suffix)
        if self.room < 1:
            raise ValueError(f"length: got {length} tokens, too few for the start, the end and one token between them")

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """[N, L] token ids -> [N, L, D] hidden states."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def chunks(self, captions: Sequence[str]) -> int:
        """How many windows the longest of the captions needs; two calls with one `chunks` give equal shapes."""
        return max(len(self._windows(caption, say=False)) for caption in checked(captions))

    def forward(self, captions: Sequence[str], *, chunks: int | None = None) -> Context:
        """Raises as `ids`."""
        ids = self.ids(captions, chunks=chunks)
        return self.context(ids, self.embed(ids.flatten(0, 1)))

    @staticmethod
    def context(ids: Tensor, hidden: Tensor) -> Context:
        """The context of windows [B, chunks, L] whose hidden states are [B * chunks, L, D]."""
        return {"encoder_hidden_states": hidden.reshape(len(ids), -1, hidden.shape[-1])}

    def ids(self, captions: Sequence[str], *, chunks: int | None = None) -> Tensor:
        """The windows of the captions, [B, chunks, L] token ids.

        Raises ValueError for an empty batch, for what is no text, and for captions that need more than `chunks`.
        """
        rows = [self._windows(caption) for caption in checked(captions)]
        needed = max(map(len, rows))
        chunks = chunks or needed
        if chunks < needed:
            raise ValueError(f"chunks: got {chunks}, but the longest caption needs {needed} windows of {self.length}")
        filled = [row + self._windows("") * (chunks - len(row)) for row in rows]
        return torch.tensor(filled, device=self.device)

    def _windows(self, caption: str, say: bool = True) -> list[list[int]]:
        content = self.tokenizer.encode(caption)
        if self.long_prompts == "cut" and len(content) > self.room:
            if say:
                lost = self.tokenizer.decode(content[self.room :])
                warnings.warn(f"the encoder reads {self.length} tokens; cut from the prompt: {lost!r}", stacklevel=3)
            content = content[: self.room]
        return windows(self.tokenizer, content, self.length)


def windows(tokenizer: Tokenizer, content: Sequence[int], length: int) -> list[list[int]]:
    """The ids of a text in one or more windows of `length`, each complete with start, end and padding."""
    room = length - len(tokenizer.prefix) - len(tokenizer.suffix)
    parts = [content[start : start + room] for start in range(0, len(content), room)] or [content]
    filled = [[*tokenizer.prefix, *part, *tokenizer.suffix] for part in parts]
    return [window + [tokenizer.pad] * (length - len(window)) for window in filled]
