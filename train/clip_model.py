"""A trained CLIP outside its training: its text tower for transformers, its files, and its judgement of pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from conditioning.clip import ClipText, ClipTextConfig, ClipTextEncoder
from conditioning.text import windows
from conditioning.tokenizer import ClipTokenizer
from pipelines.files import read_weights

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"  # open_clip's own names


def tokenise(tokenizer: ClipTokenizer, captions: Sequence[str], length: int) -> Tensor:
    """[B, L] ids, cut at `length`; padded with the end of text, as transformers pads."""
    return torch.tensor([windows(tokenizer, tokenizer.encode(caption), length)[0] for caption in captions])


def export_text_tower(model: open_clip.CLIP, tokenizer: ClipTokenizer) -> ClipTextEncoder:
    """The text tower of an `open_clip.CLIP` as a transformers CLIPTextModel: equal hidden states, to rounding."""
    state = {k: v.detach().to("cpu", torch.float32, copy=True) for k, v in model.state_dict().items()}
    width, layers = state["ln_final.weight"].shape[0], model.transformer.layers
    weights = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        weights[f"final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for i in range(layers):
            block, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            for theirs, ours in names.items():
                weights[f"{layer}.{ours}.{kind}"] = state[f"{block}.{theirs}.{kind}"]
            for name, part in zip("qkv", state[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                weights[f"{layer}.self_attn.{name}_proj.{kind}"] = part.contiguous()
    config = ClipTextConfig(
        vocab_size=model.vocab_size,
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.bias"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=model.transformer.resblocks[0].attn.num_heads,
        max_position_embeddings=model.context_length,
        hidden_act="gelu",  # transformers' default is quick_gelu
        bos_token_id=tokenizer.prefix[0],
        eos_token_id=tokenizer.suffix[0],
        pad_token_id=tokenizer.pad,
    )
    return ClipTextEncoder(ClipText.from_weights(config, weights).eval().requires_grad_(False), tokenizer)


class ClipModel:
    """A trained CLIP: pictures and captions as unit vectors, whose products say how well they match."""

    def __init__(self, model: open_clip.CLIP, tokenizer: ClipTokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.size, self.length = model.visual.image_size, model.context_length
        self.size = self.size[0] if isinstance(self.size, tuple) else self.size

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1], of any size -> [B, E] of length 1."""
        device = next(self.model.parameters()).device
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return self.model.encode_image(images.to(device, torch.float32), normalize=True)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Captions, cut at the length CLIP was trained on -> [B, E] of length 1."""
        device = next(self.model.parameters()).device
        return self.model.encode_text(tokenise(self.tokenizer, captions, self.length).to(device), normalize=True)


def load_clip(folder: str | Path) -> ClipModel:
    """Opens the `clip` folder of a training; ValueError when it is none."""
    folder = Path(folder)
    stem = WEIGHTS.removesuffix(".safetensors")
    if not (folder / CONFIG).is_file() or not list(folder.glob(f"{stem}*.safetensors")):
        raise ValueError(f"{folder}: no CLIP here; expected {CONFIG} and {WEIGHTS}, as train/clip.py writes them")
    try:
        model = open_clip.CLIP(**json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"])
        model.load_state_dict(read_weights(folder, stem))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: the files are broken or not of one model: {error}") from error
    return ClipModel(model, ClipTokenizer.from_folder(folder))


def save_clip(folder: Path, model: open_clip.CLIP, arguments: dict[str, Any], tokenizer: ClipTokenizer) -> None:
    """Writes text_encoder/, tokenizer/ and clip/ (which `open_clip.create_model("local-dir:…/clip")` opens as well).

    arguments: those of `open_clip.CLIP` that the model was made with.
    """
    export_text_tower(model, tokenizer).save(folder / "text_encoder", folder / "tokenizer")
    clip = folder / "clip"
    tokenizer.save(clip)
    half = [0.5, 0.5, 0.5]  # open_clip's pictures are in [0, 1] before this: [-1, 1] after it
    described = {"model_cfg": arguments, "preprocess_cfg": {"mean": half, "std": half}}
    (clip / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, clip / WEIGHTS)
