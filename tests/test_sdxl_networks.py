"""Stable Diffusion XL's networks against diffusers and transformers: the U-Net and both text encoders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from conditioning.clip import ClipText, ClipTextConfig
from conditioning.pair import ClipTextPair, with_sizes
from ldm.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline
from tests.sdxl import PROMPT, SUMMARY, UNET, WAVES, opened, told

LONG = "a red circle on a blue background and a green square on a white background and an oil painting of a fox"


@pytest.fixture(scope="module")
def theirs(xl_folder: Path) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(xl_folder: Path) -> TextToImagePipeline:
    return opened(xl_folder)


# The U-Net.


def test_the_unet_is_that_of_diffusers() -> None:
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**UNET).eval()
    ours = UNet.from_config(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict())
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 56)
    added = {
        "text_embeds": torch.randn(2, SUMMARY),
        "time_ids": torch.tensor([[9.0, 8, 0, 1, 9, 8], [3, 2, 1, 0, 5, 6]]),
    }
    wanted = theirs(x, t, states, added_cond_kwargs=added).sample
    torch.testing.assert_close(ours(x, t, states, added_cond_kwargs=added), wanted, atol=2e-5, rtol=1e-4)
    ours.gradient_checkpointing = True
    got = ours.train()(x, t, states, added_cond_kwargs=added)
    got.square().mean().backward()
    wanted.square().mean().backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=name)
    assert UNet2DConditionModel.from_config(ours.config.to_dict()).config.addition_time_embed_dim == WAVES


def test_the_published_unet_has_the_same_keys_and_shapes() -> None:
    """The `unet/config.json` of stable-diffusion-xl-base-1.0, and of its refiner."""
    base: dict[str, Any] = {
        "act_fn": "silu", "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
        "center_input_sample": False, "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3,
        "conv_out_kernel": 3, "cross_attention_dim": 2048, "cross_attention_norm": None,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
        "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "flip_sin_to_cos": True,
        "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05,
        "norm_num_groups": 32, "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": False,
        "out_channels": 4, "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "sample_size": 128,
        "time_cond_proj_dim": None, "time_embedding_act_fn": None, "time_embedding_dim": None,
        "time_embedding_type": "positional", "timestep_post_act": None, "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": None,
        "use_linear_projection": True,
    }  # fmt: skip
    refiner = base | {
        "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560, "transformer_layers_per_block": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }  # fmt: skip
    for config in (base, refiner):
        with torch.device("meta"):
            ours, theirs = UNet.from_config(config), UNet2DConditionModel.from_config(config)
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }


def test_the_unet_says_what_it_is_not_told() -> None:
    unet = UNet(UNetConfig(**UNET))
    x, states, summary, sizes = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 56), torch.ones(1, SUMMARY), torch.ones(1, 6)
    for added in (
        None,
        {"text_embeds": summary},
        {"text_embeds": summary, "time_ids": sizes[:, :5]},  # the refiner's
        {"text_embeds": summary[:, 1:], "time_ids": sizes},
        {"text_embeds": summary, "time_ids": sizes, "image_embeds": summary},
    ):
        with pytest.raises(ValueError, match=r"text_embeds \[B, P\] and time_ids \[B, n\] with P \+ 8 n = 68; got"):
            unet(x, 1.0, states, added_cond_kwargs=added)
    for change in ({"addition_time_embed_dim": None}, {"addition_embed_type": None}, {"addition_embed_type": "image"}):
        with pytest.raises(ValueError, match="addition_embed_type"):
            UNetConfig(**{**UNET, **change})


# The text encoders.


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_the_captions_are_encoded_as_by_diffusers(
    ours: TextToImagePipeline, theirs: StableDiffusionXLPipeline, clip_skip: int | None
) -> None:
    captions = [PROMPT, "a red circle", "", "!!! a fox"]
    states, _, summary, _ = theirs.encode_prompt(
        captions, device=torch.device("cpu"), do_classifier_free_guidance=False, clip_skip=clip_skip
    )
    pair = told(ours)
    pair.clip_skip = clip_skip or 0
    got = pair.encode(captions)
    pair.clip_skip = 0
    torch.testing.assert_close(got[0], states, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], summary, atol=1e-4, rtol=1e-4)


def test_the_towers_are_transformers_with_or_without_the_old_meaning_of_eos(xl_folder: Path) -> None:
    theirs = CLIPTextModelWithProjection.from_pretrained(xl_folder / "text_encoder_2")
    theirs.config.eos_token_id = theirs.text_model.eos_token_id = 2
    config = ClipTextConfig.from_dict(theirs.config.to_diff_dict() | {"architectures": ["CLIPTextModelWithProjection"]})
    tower = ClipText.from_weights(config, theirs.state_dict())
    ids = torch.randint(0, config.vocab_size - 1, (3, 16), generator=torch.Generator().manual_seed(0))
    ids[torch.arange(3), torch.tensor([5, 9, 15])] = config.vocab_size - 1
    wanted = theirs(ids, output_hidden_states=True)
    states = tower.states(ids)
    for got, hidden in zip(states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(got, hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tower.summary(states[-1], ids), wanted.text_embeds, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_null_is_what_the_folder_says(xl_folder: Path, zeros: bool) -> None:
    pair = told(opened(xl_folder))
    pair.zero_null = zeros
    context = pair(["a fox", ""])
    states, summary = pair.encode(["a fox", ""])
    torch.testing.assert_close(context["encoder_hidden_states"][0], states[0])
    torch.testing.assert_close(context["encoder_hidden_states"][1], states[1] * (not zeros))
    torch.testing.assert_close(context["added_cond_kwargs"]["text_embeds"][1], summary[1] * (not zeros))
    assert context["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_sizes_and_windows(ours: TextToImagePipeline) -> None:
    pair = told(ours)
    sizes = [[640, 480, 0, 8, 16, 16], [100, 200, 4, 0, 16, 16]]
    context = pair([LONG, "a fox"], sizes=torch.tensor(sizes))
    assert context["added_cond_kwargs"]["time_ids"].tolist() == sizes
    chunks = pair.chunks([LONG])
    assert context["encoder_hidden_states"].shape == (2, 16 * chunks, 56)
    assert chunks > 1
    first, _ = pair.encode([LONG.split(" and ")[0]], chunks=1)
    again = with_sizes(context, sizes[::-1])
    assert again["added_cond_kwargs"]["time_ids"].tolist() == sizes[::-1]
    assert again["encoder_hidden_states"] is context["encoder_hidden_states"]
    assert with_sizes({"encoder_hidden_states": first}, [[1]]) == {"encoder_hidden_states": first}  # told no sizes
    for wrong in (sizes[:1], [[1, 2, 3, 4, 5]] * 2):
        with pytest.raises(ValueError, match=r"expected \[2, 6\]: height and width"):
            pair(["a", "b"], sizes=wrong)
    pair.clip_skip = 3
    with pytest.raises(ValueError, match="clip_skip: got 3, expected 0 to 2"):
        pair(["a"])
    pair.clip_skip = 0


def test_a_pair_wants_a_projection_and_equal_windows(ours: TextToImagePipeline) -> None:
    pair = told(ours)
    with pytest.raises(ValueError, match="no projection: expected a CLIPTextModelWithProjection"):
        ClipTextPair(pair.first, pair.first)
    shorter = type(pair.second)(pair.second.tower, pair.second.clip_tokenizer)
    shorter.length = 8
    with pytest.raises(ValueError, match="read 16 and 8 tokens"):
        ClipTextPair(pair.first, shorter)


def test_what_learns(xl_folder: Path) -> None:
    """Gradients reach every weight but those that are never looked at, which `unused` names."""
    pair = told(opened(xl_folder)).requires_grad_(True)
    context = pair(["a fox", "a circle"])
    (context["encoder_hidden_states"].square().mean() + context["added_cond_kwargs"]["text_embeds"].sum()).backward()
    idle = {id(weight) for weight in pair.unused()}
    assert idle == {id(weight) for weight in pair.parameters() if weight.grad is None}
