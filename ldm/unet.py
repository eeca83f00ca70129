"""The U-Net of Stable Diffusion 1.x and 2.x, with the weights and config of diffusers' UNet2DConditionModel."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.blocks import (
    Downsample,
    ImageAttention,
    ModelConfig,
    Network,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    check_groups,
    check_value,
    timestep_embedding,
)
from ldm.transformer import PictureTransformer, TextContext

Call = Callable[..., Tensor]


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

    class_name: ClassVar[str] = "UNet2DConditionModel"
    fixed: ClassVar[Mapping[str, Any]] = {
        "addition_embed_type": None,
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": None,
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
        "projection_class_embeddings_input_dim": None,
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


class Block(nn.Module):
    """The layers of one level, on the way down, in the middle or up: residual blocks with an attention after each."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def layer(self, i: int, x: Tensor, time: Tensor, context: TextContext | None, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if i < len(self.attentions) else x


class DownBlock(Block):
    def __init__(self, resnets: list[ResnetBlock], attentions: list[nn.Module], downsample: Downsample | None):
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([downsample] if downsample else [])

    def forward(self, x: Tensor, time: Tensor, context: TextContext | None, call: Call) -> tuple[Tensor, list[Tensor]]:
        """Returns the output and every intermediate result, for the way up."""
        skips = []
        for i in range(len(self.resnets)):
            x = call(self.layer, i, x, time, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    def forward(self, x: Tensor, time: Tensor, context: TextContext | None, call: Call) -> Tensor:
        for i in range(len(self.resnets)):
            x = call(self.layer, i, x, time, context)
        return x


class UpBlock(Block):
    def __init__(self, resnets: list[ResnetBlock], attentions: list[nn.Module], upsample: Upsample | None):
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([upsample] if upsample else [])

    def forward(self, x: Tensor, time: Tensor, context: TextContext | None, skips: list[Tensor], call: Call) -> Tensor:
        """Takes its share of the skips from the end of the list; what is left ends with the next level's."""
        for i in range(len(self.resnets)):
            x = call(self.layer, i, x, time, context, skips.pop())
        for upsample in self.upsamplers:  # to the size of the next skip: sides need not be even
            x = upsample(x, (skips[-1].shape[2], skips[-1].shape[3]))
        return x


class UNet(Network):
    """Predicts from a noisy latent, the time and a context; `load_state_dict(strict=True)` takes
    UNet2DConditionModel's weights.

    Attributes:
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its inside.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self._contexts: dict[int, tuple[Tensor, dict]] | None = None
        widths = config.block_out_channels
        time_channels = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_channels)
        self.class_embedding: nn.Module | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(widths[0], time_channels)
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_channels)
        self.down_blocks, self.mid_block, self.up_blocks = _levels(config, time_channels)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.looks_at_context = any(isinstance(module, PictureTransformer) for module in self.modules())

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Self:
        """Builds the network, with new weights, from the contents of a `config.json`."""
        return cls(UNetConfig.from_dict(values))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Args:
            sample: [B, in_channels, H, W], sides of any length; the network's `x_t`.
            timestep: [B] or one number, fractions allowed.
            encoder_hidden_states: [B, M, cross_attention_dim], where there are CrossAttn blocks.
            encoder_attention_mask: [B, M], 1 where to look, 0 where not.
            class_labels: [B], where the config has classes.
            added_cond_kwargs: none are understood.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: a condition that the network needs and did not get, or got and has no use for.
        """
        self._check_conditions(encoder_hidden_states, encoder_attention_mask, class_labels, added_cond_kwargs)
        config = self.config
        wave = partial(
            timestep_embedding,
            channels=config.block_out_channels[0],
            cosine_first=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        time = self.time_embedding(wave(timestep).to(sample.dtype))
        if self.class_embedding is not None and class_labels is not None:
            labels = wave(class_labels).to(sample.dtype) if config.class_embed_type == "timestep" else class_labels
            time = time + self.class_embedding(labels)
        time = F.silu(time)  # every layer begins with it
        context = self._context(encoder_hidden_states, encoder_attention_mask, sample.dtype)
        call: Call = _call
        if self.gradient_checkpointing and torch.is_grad_enabled():
            call = partial(checkpoint, use_reentrant=False)

        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, context, call)
            skips += more
        if self.mid_block is not None:
            x = self.mid_block(x, time, context, call)
        for block in self.up_blocks:
            x = block(x, time, context, skips, call)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    @contextmanager
    def reuse_contexts(self) -> Iterator[None]:
        """Within it, the keys and values of a context tensor are computed when it is first seen and kept.

        For sampling, where every step looks at the same text. The weights and the tensor's contents must stay as
        they are; calls that record gradients, and compiled ones, compute anew.
        """
        self._contexts = {}
        try:
            yield
        finally:
            self._contexts = None

    def _context(self, states: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> TextContext | None:
        if states is None:
            return None
        projected = None
        if self._contexts is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The tensor itself is kept beside its results, so that its id can't pass to another one.
            _, projected = self._contexts.setdefault(id(states), (states, {}))
        if mask is not None:
            mask = (1 - mask.to(dtype))[:, None, None, :] * -10000.0  # as in diffusers; a row of zeros gives no NaN
        return TextContext(states.to(dtype), mask, projected)

    def _check_conditions(
        self, states: Tensor | None, mask: Tensor | None, labels: Tensor | None, added: Mapping[str, Tensor] | None
    ) -> None:
        width = self.config.cross_attention_dim
        if self.looks_at_context and (states is None or states.shape[-1] != width):
            got = "none" if states is None else tuple(states.shape)
            raise ValueError(
                f"encoder_hidden_states should be [B, M, {width}], as this network's encoder gives; got {got}."
            )
        if self.class_embedding is not None and labels is None:
            raise ValueError("This network was made for class_labels [B]; got none.")
        unused = {
            "encoder_hidden_states": states is not None and not self.looks_at_context,
            "encoder_attention_mask": mask is not None and states is None,
            "class_labels": labels is not None and self.class_embedding is None,
            "added_cond_kwargs": bool(added),
        }
        if any(unused.values()):
            names = ", ".join(name for name, got in unused.items() if got)
            raise ValueError(f"This network has no use for {names} and would ignore it: leave it out.")


def _call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def _levels(config: UNetConfig, time_channels: int) -> tuple[nn.ModuleList, MidBlock | None, nn.ModuleList]:
    """The ways down, through the middle and up."""
    widths, groups = config.block_out_channels, config.norm_num_groups
    heads = config.per_level("attention_head_dim")
    layers = config.per_level("layers_per_block")
    depths = config.per_level("transformer_layers_per_block")
    last = len(widths) - 1
    resnet = partial(
        ResnetBlock,
        time_channels=time_channels,
        groups=groups,
        eps=config.norm_eps,
        dropout=config.dropout,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
    )

    def attentions(kind: str, level: int, number: int) -> list[nn.Module]:
        width = widths[level]
        if "CrossAttn" in kind:
            return [
                PictureTransformer(
                    width,
                    heads=heads[level],
                    layers=depths[level],
                    groups=groups,
                    context_channels=config.cross_attention_dim,
                    linear_projection=config.use_linear_projection,
                )
                for _ in range(number)
            ]
        if kind.startswith("Attn"):
            head_dim = heads[level]  # here the key means what it says
            return [
                ImageAttention(width, heads=width // head_dim, groups=groups, eps=config.norm_eps)
                for _ in range(number)
            ]
        return []

    down, up = nn.ModuleList(), nn.ModuleList()
    skips = [widths[0]]  # widths of the results that wait for the way up
    x = widths[0]
    for level, (kind, width) in enumerate(zip(config.down_block_types, widths, strict=True)):
        sources = [x] + [width] * (layers[level] - 1)
        downsample = Downsample(width, config.downsample_padding) if level < last else None
        down.append(DownBlock([resnet(a, width) for a in sources], attentions(kind, level, layers[level]), downsample))
        skips += [width] * (layers[level] + (level < last))
        x = width
    mid = None
    if config.mid_block_type is not None:
        cross = attentions(config.mid_block_type, last, 1)
        scaled = partial(resnet, x, x, output_scale=config.mid_block_scale_factor)
        mid = MidBlock([scaled() for _ in range(1 + len(cross))], cross)
    for kind, level in zip(config.up_block_types, range(last, -1, -1), strict=True):
        width, number = widths[level], layers[level] + 1
        sources = [x] + [width] * (number - 1)
        resnets = [resnet(a + skips.pop(), width) for a in sources]
        up.append(UpBlock(resnets, attentions(kind, level, number), Upsample(width) if level > 0 else None))
        x = width
    return down, mid, up
