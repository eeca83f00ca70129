"""Textual inversion (arXiv:2208.01618): learned words, as vectors in a small file, taught to a text encoder."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from conditioning.clip import ClipTextEncoder
from pipelines.files import read_tensors
from pipelines.find import EMBEDDING as NAME
from pipelines.find import find_file

UNNAMED = "emb_params"  # AUTOMATIC1111's key: the token is the name of its file


def load_embedding(conditioner: Any, where: str | Path, token: str | None = None) -> tuple[str, ...]:
    """Teaches a text encoder the tokens of a file and returns them.

    Args:
        conditioner: the model's; only CLIP's text encoder learns.
        where: as in `pipelines.find.find_file`. {token: [D] or [n, D]} in diffusers' format, or AUTOMATIC1111's.
        token: another name for the one token of a file.

    Raises:
        ValueError: no file, nothing in it, vectors of another width, or a token that is known already; the encoder is
            as it was then.
    """
    if not isinstance(conditioner, ClipTextEncoder):
        raise ValueError(f"embeddings belong to a CLIP text encoder; this model has {type(conditioner).__name__}")
    file = find_file(where, (NAME,))
    tensors = read_tensors(file)[0]
    width = conditioner.tower.config.hidden_size
    found = {key: tensor[None] if tensor.ndim == 1 else tensor for key, tensor in tensors.items()}
    if not found or any(t.ndim != 2 or not t.is_floating_point() or not len(t) for t in found.values()):
        held = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in list(tensors.items())[:3]) or "nothing"
        raise ValueError(f"{file} holds no learned embedding: expected token: [n, {width}] vectors, got {held}")
    if wrong := [f"{key} of {t.shape[1]}" for key, t in found.items() if t.shape[1] != width]:
        raise ValueError(
            f"{file} is of another text encoder: its vectors are {', '.join(wrong[:3])} numbers, this model's {width}"
        )
    if token is not None and len(found) > 1:
        raise ValueError(f"{file} holds {len(found)} tokens ({', '.join(found)}), which can't all be called {token!r}")
    named = {token or (file.stem if key == UNNAMED else key): vectors for key, vectors in found.items()}
    conditioner.add_tokens(named)
    return tuple(named)


def save_embedding(where: str | Path, token: str, vectors: Tensor) -> Path:
    """Writes a learned token as diffusers does, for `load_textual_inversion` there and `load_embedding` here.

    where: a .safetensors file, or a folder in which it is called `NAME`. vectors: [n, D].
    """
    file = Path(where)
    file = file if file.suffix == ".safetensors" else file / NAME
    if vectors.ndim != 2:
        raise ValueError(f"vectors of {token!r}: got {list(vectors.shape)}, expected [n, D]")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({token: vectors.detach().cpu().contiguous()}, file, metadata={"format": "pt"})
    return file
