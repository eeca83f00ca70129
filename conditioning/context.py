"""What conditions a denoiser: a dict of tensors. The null context, "nothing said", is that of the empty caption.

So caption dropout, which classifier-free guidance needs (Ho and Salimans 2022, algorithm 1), is to hand over "".
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

# Tensors named as the arguments of `UNet2DConditionModel.forward`, batch first: encoder_hidden_states [B, L, D],
# encoder_attention_mask [B, L], class_labels [B], and added_cond_kwargs, itself a dict of tensors.
Context = dict[str, Any]


class Conditioner(Protocol):
    """Captions in, context out."""

    def __call__(self, captions: Sequence[str]) -> Context:
        """The context of a batch, one row a caption. Raises ValueError for an empty batch or what is no caption."""
        ...


class Unconditional(nn.Module):
    """The conditioner of a model that is told nothing: its context is empty."""

    def forward(self, captions: Sequence[str]) -> Context:
        checked(captions)
        return {}


def checked(captions: Sequence[Any], kinds: tuple[type, ...] = (str,)) -> list[Any]:
    """The captions as a list; ValueError unless they are one or more of `kinds`, in a sequence."""
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if isinstance(captions, str) or not isinstance(captions, Sequence):
        raise ValueError(f"captions: got {captions!r}, expected a list with one {wanted} for each row")
    if not captions:
        raise ValueError("captions: got an empty list, expected at least one caption ('' says nothing)")
    for i, caption in enumerate(captions):
        if not isinstance(caption, kinds) or isinstance(caption, bool):
            raise ValueError(f"captions[{i}]: got {caption!r} ({type(caption).__name__}), expected {wanted}")
    return list(captions)
