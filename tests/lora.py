"""LoRA files of random factors, for the tests that load them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines import TextToImagePipeline
from pipelines.adapters import layers_of

UNET = "down_blocks.0.attentions.0"
PATHS = {  # every kind of layer: linear, 1×1 and 3×3 convolutions
    "unet": [
        f"{UNET}.transformer_blocks.0.attn1.to_q",
        f"{UNET}.transformer_blocks.0.attn2.to_k",
        f"{UNET}.transformer_blocks.0.attn2.to_out.0",
        f"{UNET}.transformer_blocks.0.ff.net.0.proj",
        f"{UNET}.proj_in",
        "up_blocks.1.resnets.0.conv1",
        "down_blocks.0.resnets.0.time_emb_proj",
    ],
    "text_encoder": [
        "encoder.layers.0.self_attn.q_proj",
        "encoder.layers.1.self_attn.out_proj",
        "encoder.layers.1.mlp.fc1",
    ],
}


def factors(
    model: Any, rank: int = 2, seed: int = 0, paths: dict[str, list[str]] = PATHS
) -> dict[str, dict[str, Tensor]]:
    """part -> PATH.lora_A.weight and PATH.lora_B.weight, strong enough to be seen in a picture."""
    layers, made = layers_of(model), {}
    generator = torch.Generator().manual_seed(seed)
    for part, chosen in paths.items():
        made[part] = {}
        for path in chosen:
            weight: Any = layers[f"{part}.{path}"].weight
            ones = [1] * (weight.ndim - 2)
            spread = 0.6 / weight[0].numel() ** 0.5
            made[part][f"{path}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) * spread
            made[part][f"{path}.lora_B.weight"] = torch.randn(len(weight), rank, *ones, generator=generator)
    return made


def own_weights(pipe: TextToImagePipeline) -> dict[str, Tensor]:
    return {name: layer.weight.clone() for name, layer in layers_of(pipe.model).items()}


KOHYA = {"unet": "unet", "text_encoder": "te_text_model", "text_encoder_2": "te2_text_model"}  # their prefixes


def kohya_file(file: Path, made: dict, alpha: float) -> Path:
    """The names of kohya's scripts, each layer with its alpha."""
    tensors = {}
    for part, state in made.items():
        for key, value in state.items():
            path, _, factor = key.removesuffix(".weight").rpartition(".")
            name = f"lora_{KOHYA[part]}_{path}".replace(".", "_").replace("text_model_text_proj", "text_proj")
            tensors[f"{name}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = value
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file
