"""What conditions a model, as folders beside its networks: a text encoder, or two (SDXL), labels, pictures, nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from conditioning.clip import ClipText, ClipTextConfig, ClipTextEncoder
from conditioning.context import Unconditional
from conditioning.labels import Labels
from conditioning.pair import ClipTextPair
from conditioning.semantic import SemanticEncoder
from conditioning.text import TextEncoder
from conditioning.tokenizer import ClipTokenizer
from pipelines.files import blaming, open_network, read_json, read_weights, save_network

ZERO_NULL = "force_zeros_for_empty_prompt"  # diffusers' entry of model_index.json
NOTES = "atelier.json"
CONDITIONED = ("clip", "labels", "none", "semantic")  # what "conditioning" is there
ENCODERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))  # folders

Conditioning = TextEncoder | ClipTextPair | Labels | Unconditional | SemanticEncoder


def load_conditioner(
    folder: Path,
    notes: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> ClipTextEncoder | ClipTextPair | Labels | Unconditional | SemanticEncoder:
    """What conditions the model of a folder; its own kind is in atelier.json (`notes`), otherwise it is a CLIP text
    encoder, or two where there is a second."""
    kind = notes.get("conditioning", "clip")
    if kind not in CONDITIONED:
        raise ValueError(f"{folder / NOTES}: conditioning is {kind!r}, expected one of {', '.join(CONDITIONED)}")
    if kind == "labels":
        with blaming(folder / NOTES):
            return Labels(notes["labels"])
    if kind == "none":
        return Unconditional()
    if kind == "semantic":
        return open_network(SemanticEncoder, folder / "semantic_encoder")
    single = notes.get("conditioning") == "clip" and ZERO_NULL not in notes  # though saved over a pair of encoders
    if single or not (folder / "text_encoder_2").is_dir():
        return _clip(folder, *ENCODERS[0], dtype, variant)
    said = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else notes
    first, second = (_clip(folder, *names, dtype, variant) for names in ENCODERS)
    return ClipTextPair(first, second, zero_null=said.get(ZERO_NULL, True))


def save_conditioner(conditioner: Any, folder: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Writes its networks and returns what atelier.json has to say of it; `check_saved` says what can be saved."""
    if isinstance(conditioner, ClipTextPair):
        for encoder, names in zip((conditioner.first, conditioner.second), ENCODERS, strict=True):
            encoder.save(folder / names[0], folder / names[1], dtype)
        return {"conditioning": "clip", ZERO_NULL: conditioner.zero_null}
    if isinstance(conditioner, ClipTextEncoder):
        conditioner.save(folder / ENCODERS[0][0], folder / ENCODERS[0][1], dtype)
        return {"conditioning": "clip"}
    if isinstance(conditioner, Labels):
        return {"conditioning": "labels", "labels": list(conditioner.names)}
    if isinstance(conditioner, SemanticEncoder):
        save_network(conditioner, folder / "semantic_encoder", dtype)
        return {"conditioning": "semantic"}
    return {"conditioning": "none"}


def check_saved(conditioner: Any) -> None:
    """Raises ValueError for conditioning that has no layout, such as open_clip's."""
    if not isinstance(conditioner, ClipTextEncoder | ClipTextPair | Labels | Unconditional | SemanticEncoder):
        raise ValueError(
            f"a model conditioned by {type(conditioner).__name__} can't be saved: expected a ClipTextEncoder "
            "(train/clip.py exports open_clip's text tower as one), a ClipTextPair, Labels, Unconditional or a "
            "SemanticEncoder"
        )


def components(conditioner: ClipTextEncoder | ClipTextPair) -> dict[str, Any]:
    """What model_index.json says of the text encoders, and of what else goes with their kind of pipeline."""
    entries: dict[str, Any] = {"feature_extractor": [None, None], "image_encoder": [None, None]}
    entries |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    if isinstance(conditioner, ClipTextEncoder):
        return entries | {"requires_safety_checker": False, "safety_checker": [None, None]}
    return entries | {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        ZERO_NULL: conditioner.zero_null,
    }


def _clip(folder: Path, encoder: str, tokenizer: str, dtype: torch.dtype, variant: str | None) -> ClipTextEncoder:
    file = folder / encoder / "config.json"
    values, weights = read_json(file), read_weights(folder / encoder, "model", variant)
    with blaming(file):
        config = ClipTextConfig.from_dict(values)
    with blaming(folder / encoder):
        tower = ClipText.from_weights(config, weights)
    tower = tower.to(dtype).eval().requires_grad_(False)
    return ClipTextEncoder(tower, ClipTokenizer.from_folder(folder / tokenizer))
