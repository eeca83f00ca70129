"""Two CLIP towers side by side, and the sizes of a picture: what Stable Diffusion XL is told (arXiv:2307.01952)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.clip import ClipTextEncoder
from conditioning.context import Context, checked


class ClipTextPair(nn.Module):
    """Captions to three things (Podell et al. 2023, sections 2.1 and 2.2).

    `encoder_hidden_states` [B, chunks * L, D1 + D2]: of both towers what the last layer but one puts out, not
    normalised. In `added_cond_kwargs`, `text_embeds` [B, P]: the second tower's summary of the caption, of its first
    window where it has several; and `time_ids` [B, 6]: sizes, as `with_sizes` has them.

    Attributes:
        first, second: the towers with their tokenizers; the second has a projection.
        size: side in pixels that `time_ids` say when nothing is said: the original, uncropped, is a square of it.
        zero_null: whether the empty caption is zeros (diffusers' force_zeros_for_empty_prompt), or is encoded.
        clip_skip: layers left out before those; may be set at any time.
    """

    def __init__(self, first: ClipTextEncoder, second: ClipTextEncoder, *, size: int = 1024, zero_null: bool = True):
        super().__init__()
        if second.tower.text_projection is None:
            raise ValueError(
                "the second text encoder has no projection: expected a CLIPTextModelWithProjection, as config.json's "
                '"architectures" says'
            )
        if first.length != second.length:
            raise ValueError(f"the text encoders read {first.length} and {second.length} tokens: expected as many")
        self.first, self.second = first, second
        self.size, self.zero_null, self.clip_skip = size, zero_null, 0

    @property
    def widths(self) -> tuple[int, int]:
        """(D1 + D2, P)."""
        config = self.second.tower.config
        return self.first.tower.config.hidden_size + config.hidden_size, config.projection_dim or 0

    def chunks(self, captions: Sequence[str]) -> int:
        """How many windows the longest of the captions needs; two calls with one `chunks` give equal shapes."""
        return max(self.first.chunks(captions), self.second.chunks(captions))

    def forward(self, captions: Sequence[str], *, chunks: int | None = None, sizes: Any = None) -> Context:
        """The context of the captions, of which "" is the null; sizes: as `with_sizes` takes them.

        Raises ValueError as `conditioning.text.TextEncoder` does, and for sizes that are not [B, 6].
        """
        states, summary = self.encode(captions, chunks=chunks)
        if self.zero_null:
            silent = torch.tensor([not caption for caption in captions], device=states.device)
            states = states.masked_fill(silent[:, None, None], 0)
            summary = summary.masked_fill(silent[:, None], 0)
        return self.context(states, summary, sizes)

    def context(self, states: Tensor, summary: Tensor, sizes: Any = None) -> Context:
        """The context of what `encode` gave."""
        if sizes is None:
            sizes = [(self.size, self.size, 0, 0, self.size, self.size)] * len(states)
        told = {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": summary, "time_ids": None}}
        return with_sizes(told, sizes)

    def encode(
        self, captions: Sequence[str], *, chunks: int | None = None, clip_skip: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(hidden states, summaries) of captions, the empty one like any other; clip_skip: instead of its own."""
        layers = min(encoder.tower.config.num_hidden_layers for encoder in (self.first, self.second))
        skipped = self.clip_skip if clip_skip is None else clip_skip
        if not 0 <= skipped < layers:
            raise ValueError(f"clip_skip: got {skipped}, expected 0 to {layers - 1}, the layers but the last")
        captions = checked(captions)
        chunks = chunks or self.chunks(captions)
        windows, states = self.first.ids(captions, chunks=chunks), []  # [B, chunks, L]
        states.append(self.first.tower.states(windows.flatten(0, 1), 1 + skipped)[-1])
        windows = self.second.ids(captions, chunks=chunks)
        every = self.second.tower.states(windows.flatten(0, 1))
        states.append(every[-2 - skipped])
        summary = self.second.tower.summary(every[-1].unflatten(0, windows.shape[:2])[:, 0], windows[:, 0])
        return torch.cat(states, dim=-1).reshape(len(windows), -1, self.widths[0]), summary

    def unused(self) -> list[nn.Parameter]:
        """Weights of the first tower behind the layer that is looked at: nothing can be learned there."""
        tower: Any = self.first.tower
        return [*tower.encoder["layers"][-1].parameters(), *tower.final_layer_norm.parameters()]

    def add_tokens(self, tokens: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Learns words, each as one vector or several, [n, D1] and [n, D2] (textual inversion, arXiv:2208.01618).

        Raises ValueError, and learns nothing, when one is known already.
        """
        for i, encoder in enumerate((self.first, self.second)):
            encoder.clip_tokenizer.check_new({token: len(pair[i]) for token, pair in tokens.items()})
        self.first.add_tokens({token: pair[0] for token, pair in tokens.items()})
        self.second.add_tokens({token: pair[1] for token, pair in tokens.items()})


def with_sizes(context: Context, sizes: Tensor | Sequence[Sequence[float]]) -> Context:
    """The context with other sizes; one that is told of none stays as it is.

    sizes: [B, 6], in pixels: height and width of the original; top and left of the crop that was taken of it, after it
    was resized; height and width of the picture that is wanted (diffusers' original_size, crops_coords_top_left and
    target_size).

    Raises ValueError for another shape.
    """
    added = context.get("added_cond_kwargs") or {}
    if "time_ids" not in added:
        return context
    states = context["encoder_hidden_states"]
    wanted = torch.as_tensor(sizes, dtype=torch.float32, device=states.device)
    if tuple(wanted.shape) != (len(states), 6):
        raise ValueError(
            f"sizes: got {tuple(wanted.shape)}, expected [{len(states)}, 6]: height and width of the original, top and "
            "left of the crop, height and width wanted"
        )
    return {**context, "added_cond_kwargs": {**added, "time_ids": wanted}}
