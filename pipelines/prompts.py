"""From prompts and negative prompts to the two contexts of classifier-free guidance."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conditioning.clip import ClipTextEncoder
from conditioning.context import Context
from conditioning.pair import ClipTextPair
from conditioning.semantic import SemanticEncoder
from conditioning.text import TextEncoder


def contexts(
    conditioner: Any, prompts: list[str], negatives: list[str] | None, clip_skip: int | None
) -> tuple[Context, Context]:
    """The contexts of the prompts and of the negative prompts (None: of nothing), one row each, in one shape.

    Raises ValueError for a conditioner that takes no texts, or has no layers to skip.
    """
    if isinstance(conditioner, SemanticEncoder):
        raise ValueError("this is a diffusion autoencoder, told pictures: open it by DiffusionAutoencoderPipeline")
    if clip_skip and not isinstance(conditioner, ClipTextEncoder | ClipTextPair):
        raise ValueError("clip_skip belongs to a model with a CLIP text encoder")
    group = negatives or [""] * len(prompts)
    if not isinstance(conditioner, TextEncoder | ClipTextPair):
        return conditioner(prompts), conditioner(group)
    # Both in as many windows as the longest needs, and every distinct text once.
    texts = list(dict.fromkeys(prompts + group))
    row = {text: i for i, text in enumerate(texts)}
    cond, uncond = ([row[text] for text in part] for part in (prompts, group))
    with _skipping(conditioner, clip_skip):
        if isinstance(conditioner, TextEncoder):
            states = conditioner(texts)["encoder_hidden_states"]
            return {"encoder_hidden_states": states[cond]}, {"encoder_hidden_states": states[uncond]}
        states, summaries = conditioner.encode(texts)
        # As diffusers: an empty text that was asked for is encoded, only no text at all may be zeros.
        heard = 0 if negatives is None and conditioner.zero_null else 1
        null = conditioner.context(states[uncond] * heard, summaries[uncond] * heard)
        return conditioner.context(states[cond], summaries[cond]), null


@contextmanager
def _skipping(encoder: TextEncoder | ClipTextPair, clip_skip: int | None) -> Iterator[None]:
    """The encoder without its last layers, where asked for, and as it was afterwards."""
    if clip_skip is None or not isinstance(encoder, ClipTextEncoder | ClipTextPair):
        yield
        return
    kept, encoder.clip_skip = encoder.clip_skip, clip_skip
    try:
        yield
    finally:
        encoder.clip_skip = kept
