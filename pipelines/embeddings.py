"""Textual inversion (arXiv:2208.01618): learned words, as vectors in a small file, taught to the text encoders."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from conditioning.clip import ClipTextEncoder
from conditioning.pair import ClipTextPair
from pipelines.files import read_tensors
from pipelines.find import EMBEDDING as NAME
from pipelines.find import find_file

UNNAMED = "emb_params"  # AUTOMATIC1111's key: the token is the name of its file
PAIR = ("clip_l", "clip_g")  # the keys for SDXL's two text encoders: the same


def load_embedding(conditioner: Any, where: str | Path, token: str | None = None) -> tuple[str, ...]:
    """Teaches a text encoder, or SDXL's two, the tokens of a file and returns them.

    Args:
        conditioner: the model's; only CLIP's text encoders learn.
        where: as in `pipelines.find.find_file`. {token: [D] or [n, D]} in diffusers' format, or AUTOMATIC1111's; for
            two text encoders {"clip_l": [n, D1], "clip_g": [n, D2]}.
        token: another name for the one token of a file.

    Raises:
        ValueError: no file, nothing in it, vectors of another width, or a token that is known already; the encoder is
            as it was then.
    """
    if not isinstance(conditioner, ClipTextEncoder | ClipTextPair):
        raise ValueError(f"embeddings belong to a CLIP text encoder; this model has {type(conditioner).__name__}")
    file = find_file(where, (NAME,))
    tensors, header = read_tensors(file)
    found = {key: tensor[None] if tensor.ndim == 1 else tensor for key, tensor in tensors.items()}
    widths = _widths(conditioner)
    expected = " and ".join(f"{key} [n, {width}]" for key, width in widths.items())
    if not found or any(t.ndim != 2 or not t.is_floating_point() or not len(t) for t in found.values()):
        held = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in list(tensors.items())[:3]) or "nothing"
        raise ValueError(f"{file} holds no learned embedding: expected {expected}, got {held}")
    if isinstance(conditioner, ClipTextPair) and found.keys() != set(PAIR):
        held = ", ".join(f"{key} of {t.shape[1]} numbers" for key, t in list(found.items())[:3])
        raise ValueError(f"{file} is not for two text encoders: expected {expected}, got {held}")
    if wrong := [f"{k} of {t.shape[1]}" for k, t in found.items() if t.shape[1] != widths.get(k, widths.get("token"))]:
        numbers = " and ".join(str(width) for width in widths.values())
        raise ValueError(
            f"{file} is of another text encoder: its vectors are {', '.join(wrong[:3])} numbers, this model's {numbers}"
        )
    if isinstance(conditioner, ClipTextPair):
        name = token or header.get("token") or file.stem
        conditioner.add_tokens({name: (found[PAIR[0]], found[PAIR[1]])})
        return (name,)
    if token is not None and len(found) > 1:
        raise ValueError(f"{file} holds {len(found)} tokens ({', '.join(found)}), which can't all be called {token!r}")
    named = {token or (file.stem if key == UNNAMED else key): vectors for key, vectors in found.items()}
    conditioner.add_tokens(named)
    return tuple(named)


def save_embedding(where: str | Path, token: str, vectors: Tensor | tuple[Tensor, Tensor]) -> Path:
    """Writes a learned token as diffusers does, for `load_textual_inversion` there and `load_embedding` here.

    Args:
        where: a .safetensors file, or a folder in which it is called `NAME`.
        vectors: [n, D]; or two, [n, D1] and [n, D2], for SDXL's text encoders.
    """
    file = Path(where)
    file = file if file.suffix == ".safetensors" else file / NAME
    of = {token: vectors} if isinstance(vectors, Tensor) else dict(zip(PAIR, vectors, strict=True))
    for value in of.values():
        if value.ndim != 2:
            raise ValueError(f"vectors of {token!r}: got {list(value.shape)}, expected [n, D]")
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt"} if isinstance(vectors, Tensor) else {"token": token}  # one entry, as of `save_lora`
    save_file({key: value.detach().cpu().contiguous() for key, value in of.items()}, file, metadata=header)
    return file


def _widths(conditioner: ClipTextEncoder | ClipTextPair) -> dict[str, int]:
    """How many numbers a vector has in a file for these."""
    if isinstance(conditioner, ClipTextEncoder):
        return {"token": conditioner.tower.config.hidden_size}
    encoders = (conditioner.first, conditioner.second)
    return {key: encoder.tower.config.hidden_size for key, encoder in zip(PAIR, encoders, strict=True)}
