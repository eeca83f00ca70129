"""The U-Net of Stable Diffusion 1.x, 2.x and XL, with the weights and config of diffusers' UNet2DConditionModel."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.blocks import (
    Downsample,
    ImageAttention,
    Network,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    timestep_embedding,
)
from ldm.transformer import PictureTransformer, TextContext
from ldm.unet_config import UNetConfig

Call = Callable[..., Tensor]


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

    config_class = UNetConfig

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
        self.add_embedding: TimestepEmbedding | None = None
        if config.projection_class_embeddings_input_dim is not None:
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, time_channels)
        self.down_blocks, self.mid_block, self.up_blocks = _levels(config, time_channels)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.looks_at_context = any(isinstance(module, PictureTransformer) for module in self.modules())

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
            added_cond_kwargs: where the config says "text_time" (SDXL; arXiv:2307.01952, section 2.2), text_embeds
                [B, P], summaries of the captions, and time_ids [B, n], sizes in pixels: P + n *
                addition_time_embed_dim numbers for each picture.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: a condition that the network needs and did not get, or got and has no use for.
        """
        self._check_conditions(encoder_hidden_states, encoder_attention_mask, class_labels, added_cond_kwargs)
        config = self.config
        waves = partial(timestep_embedding, cosine_first=config.flip_sin_to_cos, freq_shift=config.freq_shift)
        wave = partial(waves, channels=config.block_out_channels[0])
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        time = self.time_embedding(wave(timestep).to(sample.dtype))
        if self.class_embedding is not None and class_labels is not None:
            labels = wave(class_labels).to(sample.dtype) if config.class_embed_type == "timestep" else class_labels
            time = time + self.class_embedding(labels)
        if self.add_embedding is not None and added_cond_kwargs:
            summary, sizes = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
            sizes = waves(sizes.flatten(), channels=config.addition_time_embed_dim or 0).view(len(sample), -1)
            time = time + self.add_embedding(torch.cat([summary.to(sample.dtype), sizes.to(sample.dtype)], dim=1))
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
        kept = self._contexts  # bound once: another thread's call may end meanwhile
        if kept is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The tensor itself is kept beside its results, so that its id can't pass to another one.
            _, projected = kept.setdefault(id(states), (states, {}))
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
        if self.add_embedding is not None:
            self._check_added(added or {})
        unused = {
            "encoder_hidden_states": states is not None and not self.looks_at_context,
            "encoder_attention_mask": mask is not None and states is None,
            "class_labels": labels is not None and self.class_embedding is None,
            "added_cond_kwargs": bool(added) and self.add_embedding is None,
        }
        if any(unused.values()):
            names = ", ".join(name for name, got in unused.items() if got)
            raise ValueError(f"This network has no use for {names} and would ignore it: leave it out.")

    def _check_added(self, added: Mapping[str, Tensor]) -> None:
        config = self.config
        width, each = config.projection_class_embeddings_input_dim or 0, config.addition_time_embed_dim or 0
        shapes = {name: tuple(value.shape) for name, value in added.items()}
        numbers = [shape[-1] for name in ("text_embeds", "time_ids") if len(shape := shapes.get(name, ())) == 2]
        if len(shapes) != 2 or len(numbers) != 2 or numbers[0] + numbers[1] * each != width:
            raise ValueError(
                f"added_cond_kwargs should be text_embeds [B, P] and time_ids [B, n] with P + {each} n = {width}; "
                f"got {shapes or 'none'}."
            )


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
