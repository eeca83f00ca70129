"""What conditions a denoiser: a dict of tensors, the null context that stands for "nothing said", and its dropout."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Tensors named as the arguments of `UNet2DConditionModel.forward`, batch first: encoder_hidden_states [B, L, D],
# encoder_attention_mask [B, L], class_labels [B], and added_cond_kwargs, itself a dict of tensors.
Context = dict[str, Any]


class Conditioner(Protocol):
    """Captions in, context out."""

    def __call__(self, captions: Sequence[str]) -> Context:
        """The context of a batch, one row a caption. Raises ValueError for an empty batch or what is no caption."""
        ...

    def null(self, n: int, like: Context | None = None) -> Context:
        """`n` rows of the context that says nothing, of the shape of `like`'s rows where that is given."""
        ...


class Unconditional(nn.Module):
    """The conditioner of a model that is told nothing: its context is empty, its null too."""

    def forward(self, captions: Sequence[str]) -> Context:
        checked(captions)
        return {}

    def null(self, n: int, like: Context | None = None) -> Context:
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


def drop(context: Context, null: Context, mask: Tensor) -> Context:
    """Caption dropout, which classifier-free guidance needs: the rows where `mask` [B] is true become the null's.

    `mask` is `uniforms < rate`, drawn by the caller, so that dropping is a function of the step's own draws (Ho and
    Salimans 2022, algorithm 1). Raises ValueError when the two contexts differ in names or shapes.
    """
    if context.keys() != null.keys():
        raise ValueError(f"the context has {sorted(context)}, its null {sorted(null)}: both must come of one encoder")
    dropped: Context = {}
    for name, value in context.items():
        if isinstance(value, dict):
            dropped[name] = drop(value, null[name], mask)
            continue
        if value.shape != null[name].shape or mask.shape != value.shape[:1]:
            raise ValueError(
                f"{name}: the context is {tuple(value.shape)}, its null {tuple(null[name].shape)}, the mask "
                f"{tuple(mask.shape)}; expected equal shapes and a mask entry a row: encoder.null(n, like=context)"
            )
        rows = mask.to(value.device, torch.bool).view(-1, *[1] * (value.ndim - 1))
        dropped[name] = torch.where(rows, null[name].to(value), value)
    return dropped
