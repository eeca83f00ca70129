"""What shapes the U-Net: the `config.json` of diffusers' UNet2DConditionModel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ldm.blocks import ModelConfig, check_groups, check_value


@dataclass(frozen=True)
class UNetConfig(ModelConfig):
    """Keys and defaults of UNet2DConditionModel. A level is one resolution; each but the last halves the sides.

    Despite its name `attention_head_dim` is the NUMBER of heads of the cross-attention blocks (of all levels, or of
    each); only in the Attn blocks is it what it says. `num_attention_heads`, where a config has it, overrides it.
    """

    sample_size: int | tuple[int, int] | None = None  # side of the latents it was trained on, a note for pipelines
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None  # None: learnt, if there are classes; "timestep": labels are numbers, as times
    num_class_embeds: int | None = None
    upcast_attention: bool = False  # without effect: scores are accumulated in float32 anyway
    resnet_time_scale_shift: str = "default"
    addition_embed_type: str | None = None  # "text_time": told of a caption's summary and of sizes, as SDXL is
    addition_time_embed_dim: int | None = None  # waves for each of the sizes
    projection_class_embeddings_input_dim: int | None = None  # width of the summary and of all sizes' waves together

    class_name: ClassVar[str] = "UNet2DConditionModel"
    fixed: ClassVar[Mapping[str, Any]] = {
        "addition_embed_type_num_heads": 64,
        "attention_type": "default",
        "center_input_sample": False,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "num_attention_heads": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
    }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        if (heads := values.get("num_attention_heads")) is not None:
            values = {**values, "attention_head_dim": heads, "num_attention_heads": None}
        return super().from_dict(values)

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for kind in self.down_block_types:
            check_value("down_block_types", kind, "CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")
        for kind in self.up_block_types:
            check_value("up_block_types", kind, "CrossAttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
        for key in ("down_block_types", "up_block_types"):
            if len(getattr(self, key)) != levels:
                raise ValueError(
                    f"{key}={getattr(self, key)} should name {levels} blocks, as many as block_out_channels."
                )
        for key in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
            numbers = self.per_level(key)
            if len(numbers) != levels or not all(isinstance(n, int) and n > 0 for n in numbers):
                raise ValueError(f"{key}={getattr(self, key)!r} should be one positive integer, or {levels} of them.")
        check_value("mid_block_type", self.mid_block_type, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
        check_value("act_fn", self.act_fn, "silu", "swish")
        check_value("resnet_time_scale_shift", self.resnet_time_scale_shift, "default", "scale_shift")
        check_value("class_embed_type", self.class_embed_type, None, "timestep")
        check_value("downsample_padding", self.downsample_padding, 0, 1)
        check_value("addition_embed_type", self.addition_embed_type, None, "text_time")
        for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            width, wanted = getattr(self, key), self.addition_embed_type is not None
            if (isinstance(width, int) and width > 0) != wanted or (width is not None) != wanted:
                expected = "a positive integer" if wanted else "None"
                raise ValueError(
                    f"{key}={width!r} with addition_embed_type={self.addition_embed_type!r}: expected {expected}."
                )
        if not isinstance(self.cross_attention_dim, int):
            raise ValueError(f"cross_attention_dim={self.cross_attention_dim!r} should be one integer for all levels.")
        check_groups(self.block_out_channels, self.norm_num_groups)
        for width, number in zip(self.block_out_channels, self.per_level("attention_head_dim"), strict=True):
            if width % number:
                raise ValueError(f"attention_head_dim={number} should divide the width {width} of its level.")

        if (
            any(kind.startswith("Attn") for kind in self.down_block_types + self.up_block_types)
            and len(set(self.per_level("attention_head_dim"))) > 1
        ):
            # UNet2DConditionModel reads the list backwards on one way only: nothing sensible could be meant by it.
            raise ValueError(f"attention_head_dim={self.attention_head_dim} should be one integer with Attn blocks.")

    def per_level(self, key: str) -> tuple[int, ...]:
        """The value of a key that is one number for all levels, or one for each."""
        value = getattr(self, key)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)
