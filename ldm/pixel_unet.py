"""The U-Net for small pictures in pixel space, told the noise and the class by its normalisations.

Residual blocks under conditional batch (or group) normalisation, self-attention where wished, average pooling on the
way down, nearest neighbours and a 3×3 convolution on the way up: the network of S. Nguyen, "Diffusion model"
(lecture, 2023). It has a layout of its own, which diffusers does not know.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.blocks import (
    AttentionLayer,
    ModelConfig,
    Network,
    attend,
    check_groups,
    check_value,
    to_picture,
    to_tokens,
)


@dataclass(frozen=True)
class PixelUNetConfig(ModelConfig):
    """One entry a level in each tuple, the last level being the bridge; every level halves the sides."""

    in_channels: int = 3
    out_channels: int = 3
    sample_size: int = 32  # side of the pictures, a note for the reader
    block_out_channels: tuple[int, ...] = (64, 128, 256)
    layers_per_block: tuple[int, ...] = (2, 2, 2)
    attention_heads: tuple[int, ...] = (4, 4, 4)  # 0: no self-attention at this level
    norm: str = "batch"  # or "group"
    norm_num_groups: int = 32  # of group normalisation
    condition_channels: int = 8  # width of the embeddings of noise and class
    timestep_scale: float = 1.0  # on the clock, before its Fourier features: EDM's spans 2.6, a table's rows a thousand
    num_class_embeds: int | None = None  # classes and their null; None: unconditional

    class_name: ClassVar[str] = "PixelUNet"
    fixed: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for key in ("layers_per_block", "attention_heads"):
            if len(getattr(self, key)) != levels:
                raise ValueError(f"{key}={getattr(self, key)} should have {levels} entries, as block_out_channels has.")
        check_value("norm", self.norm, "batch", "group")
        if self.norm == "group":
            check_groups(self.block_out_channels, self.norm_num_groups)
        if self.condition_channels % 2:
            raise ValueError(f"condition_channels={self.condition_channels} should be even: sines and cosines.")
        for width, heads in zip(self.block_out_channels, self.attention_heads, strict=True):
            if heads and width % heads:
                raise ValueError(f"attention_heads={self.attention_heads}: {heads} should divide the width {width}.")


class ConditionalNorm(nn.Module):
    """Normalisation whose scale and shift are linear in the condition; at first it is the plain one."""

    def __init__(self, channels: int, config: PixelUNetConfig):
        super().__init__()
        self.norm: nn.Module
        if config.norm == "batch":
            self.norm = nn.BatchNorm2d(channels, affine=False)
        else:
            self.norm = nn.GroupNorm(config.norm_num_groups, channels, affine=False)
        self.condition = nn.Linear(config.condition_channels, 2 * channels)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class ResidualBlock(nn.Module):
    """norm, SiLU, 3×3 convolution, twice, beside a shortcut; the branch begins at zero."""

    def __init__(self, in_channels: int, out_channels: int, config: PixelUNetConfig):
        super().__init__()
        self.norm1 = ConditionalNorm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = ConditionalNorm(out_channels, config)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, condition)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h, condition)))


class SelfAttention(AttentionLayer):
    """Every position looks at all others; begins as the identity."""

    def __init__(self, channels: int, heads: int, config: PixelUNetConfig):
        super().__init__()
        self.heads = heads
        self.norm = ConditionalNorm(channels, config)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        q, k, v = to_tokens(self.to_qkv(self.norm(x, condition))).chunk(3, dim=2)
        seen = attend(q, k, v, self.heads, None, self.backend)
        return x + self.to_out(to_picture(seen, (x.shape[2], x.shape[3])))


class Level(nn.Module):
    """The layers of one resolution, on one way."""

    def __init__(self, in_channels: int, level: int, config: PixelUNetConfig):
        super().__init__()
        width, layers = config.block_out_channels[level], config.layers_per_block[level]
        heads = config.attention_heads[level]
        widths = [in_channels] + [width] * layers
        self.resnets = nn.ModuleList(ResidualBlock(a, b, config) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(SelfAttention(width, heads, config) for _ in range(layers if heads else 0))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, condition)
            if self.attentions:
                x = self.attentions[i](x, condition)
        return x


class PixelUNet(Network):
    """See the module's text. In batch normalisation, training and sampling differ: `eval()` before sampling."""

    frequencies: Tensor

    config_class = PixelUNetConfig
    exact = ("frequencies",)  # in 16 bits they would be those of other features

    def __init__(self, config: PixelUNetConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        # Random, and kept: Fourier features of log(sigma) / 4 (arXiv:2011.13456, appendix H.2).
        self.register_buffer("frequencies", torch.randn(config.condition_channels // 2))
        self.class_embedding: nn.Embedding | None = None
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.condition_channels)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Level(widths[max(i - 1, 0)], i, config) for i in range(len(widths)))
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(Level(2 * width, i, config) for i, width in enumerate(widths[:-1]))
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Args:
            sample: [B, in_channels, H, W], sides of at least 2^(levels - 1); the network's `x_t`.
            timestep: [B] or one number of the schedule's clock, which times `timestep_scale` is about EDM's,
                log(sigma) / 4, in how far it runs.
            class_labels: [B], where the config has classes.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: labels that the network needs and did not get, or got and has no use for.
        """
        if (class_labels is None) != (self.class_embedding is None):
            wanted = "needs class_labels [B]" if class_labels is None else "has no classes: leave class_labels out"
            raise ValueError(f"This network {wanted}.")
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        clock = self.config.timestep_scale * timestep.float()
        angle = 2 * math.pi * clock[:, None] * self.frequencies.float()
        condition = torch.cat([angle.cos(), angle.sin()], dim=1).to(sample.dtype)
        if self.class_embedding is not None and class_labels is not None:
            condition = condition + self.class_embedding(class_labels)
        x, skips = self.conv_in(sample), []
        for i, level in enumerate(self.down):
            x = level(F.avg_pool2d(x, 2) if i else x, condition)
            skips.append(x)
        x = skips.pop()
        for narrow, level in zip(reversed(self.narrow), reversed(self.up), strict=True):
            skip = skips.pop()
            x = narrow(F.interpolate(x, skip.shape[2:], mode="nearest"))
            x = level(torch.cat([x, skip], dim=1), condition)
        return self.conv_out(x)
