"""Pictures as conditioning: the semantic encoder of a diffusion autoencoder (Preechakul et al. 2022, arXiv:2111.15640).

What a picture shows becomes one vector, the semantic code, which the denoiser is told at every noise level. What the
code leaves out is in the stochastic code, the noise that the probability flow turns into this picture
(`pipelines.diffusion_autoencoder`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.context import Context


@dataclass(frozen=True)
class SemanticConfig:
    """config.json of a `SemanticEncoder`. A level is one resolution; each but the last halves the sides."""

    code_dim: int = 64  # numbers in a code
    in_channels: int = 3  # of the pictures: 3, or 1 for the mean of their colours
    block_out_channels: tuple[int, ...] = (16, 32, 64, 64)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    fields: int = 4  # the last level is averaged into fields × fields, so that the code knows what is where

    def __post_init__(self) -> None:
        if self.in_channels not in (1, 3):
            raise ValueError(f"in_channels={self.in_channels}: expected 3, or 1 for grey pictures")
        if min(self.code_dim, self.layers_per_block, self.fields) < 1:
            raise ValueError(f"{self}: expected code_dim, layers_per_block and fields of at least 1")
        if not self.block_out_channels or any(w < 1 or w % self.norm_num_groups for w in self.block_out_channels):
            raise ValueError(
                f"block_out_channels={self.block_out_channels}: expected multiples of {self.norm_num_groups}, the "
                "norm_num_groups"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SemanticConfig":
        """Reads a config.json; ValueError, by name, for another class or a key that does not exist."""
        if values.get("_class_name", "SemanticEncoder") != "SemanticEncoder":
            raise ValueError(f"this config is of a {values['_class_name']}; expected one of a SemanticEncoder")
        own: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if not key.startswith("_")
        }
        if strange := own.keys() - {field.name for field in fields(cls)}:
            raise ValueError(f"a SemanticEncoder has no config key {', '.join(sorted(strange))}: remove it")
        return cls(**own)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json."""
        return {"_class_name": "SemanticEncoder", **asdict(self)}


class Block(nn.Module):
    """norm, SiLU, convolution, twice, beside a shortcut; the branch begins at zero."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, in_channels), nn.GroupNorm(groups, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class SemanticEncoder(nn.Module):
    """Pictures in, `encoder_hidden_states` [B, 1, D] out: a conditioner whose captions are pictures.

    To one token all attention is the same, so cross-attention adds a linear function of the code at every position and
    level, where the paper's U-Net scales by one as well (its equation 7).
    """

    def __init__(self, config: SemanticConfig):
        super().__init__()
        self.config = config
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        layers: list[nn.Module] = []
        for before, width in pairwise((widths[0], *widths)):
            layers += [nn.Conv2d(before, before, 3, stride=2, padding=1)] if layers else []
            sources = [before] + [width] * (config.layers_per_block - 1)
            layers += [Block(channels, width, groups) for channels in sources]
        self.layers = nn.Sequential(*layers)
        self.norm_out = nn.GroupNorm(groups, widths[-1])
        self.linear_out = nn.Linear(widths[-1] * config.fields**2, config.code_dim)

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "SemanticEncoder":
        """Builds the network, with new weights, from the contents of a `config.json`."""
        return cls(SemanticConfig.from_dict(values))

    def encode(self, images: Tensor) -> Tensor:
        """Semantic codes.

        Args:
            images: [B, 3, H, W], or [B, 1, H, W] where they are grey, in [-1, 1], sides of any length.

        Returns:
            [B, code_dim].

        Raises:
            ValueError: what is no batch of pictures, captions for instance.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"a diffusion autoencoder is told pictures [B, 3 or 1, H, W] in [-1, 1]; got {got}")
        if self.config.in_channels == 1:
            images = images.mean(1, keepdim=True)
        x = self.layers(self.conv_in(images.expand(-1, self.config.in_channels, -1, -1).to(self.linear_out.weight)))
        x = F.adaptive_avg_pool2d(F.silu(self.norm_out(x)), self.config.fields)
        return self.linear_out(x.flatten(1))

    def context(self, codes: Tensor) -> Context:
        """Semantic codes [B, code_dim] -> what the U-Net is told."""
        return {"encoder_hidden_states": codes[:, None]}

    def forward(self, images: Tensor) -> Context:
        """Pictures, as `encode` takes them -> what the U-Net is told."""
        return self.context(self.encode(images))
