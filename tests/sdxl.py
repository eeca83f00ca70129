"""A tiny Stable Diffusion XL of random weights, made by diffusers and transformers, and how it is painted with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from conditioning.pair import ClipTextPair
from conditioning.tokenizer import ClipTokenizer
from pipelines import TextToImagePipeline
from tests.conftest import CAPTIONS

PROMPT = "an oil painting of a fox!"
LENGTH, SUMMARY, WAVES = 16, 20, 8  # tokens of a window; widths of text_embeds and of each size
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 24 + 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": WAVES,
    "projection_class_embeddings_input_dim": SUMMARY + 6 * WAVES,
    "norm_num_groups": 8,
}


def tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The second pads with the first token of the vocabulary, "!", as SDXL's does."""
    ClipTokenizer.train(CAPTIONS * 4, size=600, length=LENGTH).save(folder)
    first, second = CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder, pad_token="!")
    assert second.pad_token_id == 0
    return first, second


def tower(kind: Any, width: int, tokenizer: CLIPTokenizer, **changes: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=3.0,  # strong enough to be seen in a picture
        **changes,
    )
    return kind(config).eval()


def their_pipeline(folder: Path, *, zeros: bool = True, **unet: Any) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    first, second = tokenizers(folder / "tokenizer_files")
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
        force_upcast=True,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=tower(CLIPTextModel, 24, first, hidden_act="quick_gelu", projection_dim=24),
        text_encoder_2=tower(CLIPTextModelWithProjection, 32, second, hidden_act="gelu", projection_dim=SUMMARY),
        tokenizer=first,
        tokenizer_2=second,
        unet=UNet2DConditionModel(**{**UNET, **unet}).eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def opened(folder: Path, **options: Any) -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained(folder, device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def told(pipe: TextToImagePipeline) -> ClipTextPair:
    assert isinstance(pipe.model.conditioner, ClipTextPair)
    return pipe.model.conditioner


def painted(pipe: Any, prompt: Any = PROMPT, **options: Any) -> np.ndarray:
    count = 1 if isinstance(prompt, str) else len(prompt)
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 5, "guidance_scale": 4.0, "latents": latents, "output_type": "np", **options}
    return pipe(prompt, **call).images


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, atol=5e-4)
    assert ours.std() > 0.02  # not one flat grey, which would agree by itself
