"""From prompts and negative prompts to the two contexts of classifier-free guidance."""

from typing import Any

import torch
from torch import Tensor

from conditioning.clip import ClipTextEncoder
from conditioning.context import Context
from conditioning.pair import ClipTextPair
from conditioning.semantic import SemanticEncoder
from conditioning.text import TextEncoder


def contexts(
    conditioner: Any, prompts: list[str], negatives: list[str] | None, clip_skip: int | None
) -> tuple[Context, Context]:
    """The contexts of the prompts and of the negative prompts (None: of nothing), one row each, in one shape.

    A prompt and its negative one are read in as many windows as the longer needs. Rows that need fewer than others are
    filled up with windows that the mask leaves out: a picture is the same, whatever it is painted beside.

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
    needed = {text: conditioner.chunks([text]) for text in texts}
    own = torch.tensor([max(needed[text] for text in pair) for pair in zip(prompts, group, strict=True)])
    skipping = {"clip_skip": clip_skip} if isinstance(conditioner, ClipTextEncoder | ClipTextPair) else {}
    if isinstance(conditioner, TextEncoder):
        states = conditioner(texts, **skipping)["encoder_hidden_states"]
        mask = _mask(own, states)
        return {"encoder_hidden_states": states[cond]} | mask, {"encoder_hidden_states": states[uncond]} | mask
    states, summaries = conditioner.encode(texts, **skipping)
    # As diffusers: an empty text that was asked for is encoded, only no text at all may be zeros.
    heard = 0 if negatives is None and conditioner.zero_null else 1
    null = conditioner.context(states[uncond] * heard, summaries[uncond] * heard)
    mask = _mask(own, states)
    return conditioner.context(states[cond], summaries[cond]) | mask, null | mask


def _mask(own: Tensor, states: Tensor) -> dict[str, Tensor]:
    """Where to look, [N, L], for rows that have `own` of the windows in L; none where all have as many."""
    if bool((own == own.max()).all()):
        return {}
    looked = torch.arange(int(own.max())) < own[:, None]
    return {"encoder_attention_mask": looked.repeat_interleave(states.shape[1] // looked.shape[1], 1).to(states.device)}
