"""The U-Net's config: diffusers' keys and defaults, published configs, refusals by name."""

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from ldm.unet import UNet, UNetConfig

SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}

# The `unet/config.json` of Stable Diffusion 1.5 and 2.1, written by diffusers 0.6 and 0.10.
SD_15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD_21 = {
    **SD_15,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}


@pytest.mark.parametrize("config", [SD_15, SD_21], ids=["SD 1.5", "SD 2.1"])
def test_published_configs_have_the_same_keys_and_shapes(config):
    with torch.device("meta"):
        ours = UNet.from_config(config)
        theirs = UNet2DConditionModel.from_config(config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.config.block_out_channels == (320, 640, 1280, 1280)


def test_defaults_and_keys_are_those_of_diffusers():
    with torch.device("meta"):
        model: Any = UNet2DConditionModel()
    theirs = dict(model.config)
    config = UNetConfig.from_dict(theirs)
    assert config == UNetConfig()
    assert {k for k in theirs if not k.startswith("_")} == {f.name for f in dataclasses.fields(config)} | {
        *config.fixed
    }


def test_a_config_survives_the_round_trip():
    config = UNetConfig(**SMALL, use_linear_projection=True, layers_per_block=(1, 2))
    written = config.to_dict()
    assert written["_class_name"] == "UNet2DConditionModel"
    assert written["block_out_channels"] == [16, 32]
    assert UNetConfig.from_dict(written) == config
    assert UNetConfig.from_dict({**written, "num_attention_heads": 2}).attention_head_dim == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("addition_embed_type", "text_time"),
        ("encoder_hid_dim", 12),
        ("time_cond_proj_dim", 8),
        ("only_cross_attention", True),
        ("class_embed_type", "projection"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("down_block_types", ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]),
        ("act_fn", "gelu"),
        ("cross_attention_dim", [12, 12]),
        ("norm_num_groups", 7),
        ("attention_head_dim", 5),
        ("layers_per_block", [2, 2, 2]),
        ("up_block_types", ["UpBlock2D"]),
        ("resnet_time_scale_shift", "ada_group"),
        ("no_such_key", 1),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        UNetConfig.from_dict({**SMALL, key: value})


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="UNet2DModel"):
        UNetConfig.from_dict({"_class_name": "UNet2DModel"})


def test_attn_blocks_refuse_heads_that_differ_by_level():
    changes = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": (4, 8)}
    with pytest.raises(ValueError, match="attention_head_dim"):
        UNetConfig(**{**SMALL, **changes})
