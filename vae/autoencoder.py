"""The autoencoder of latent diffusion (Rombach et al., 2022), with the weights and config of diffusers' AutoencoderKL.

Latents are what the diffusion sees, (z - shift_factor) * scaling_factor, of about unit variance; z, the raw latent,
does not leave this file.
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
    Downsample,
    ImageAttention,
    ModelConfig,
    Network,
    ResnetBlock,
    Upsample,
    check_groups,
    check_value,
)

NORM_EPS = 1e-6

# Of pictures that are encoded or decoded without a gradient. On a CPU their layers stay in the processor's caches then:
# pictures of 128×128 are encoded 2.1 times as fast four at a time as sixteen at a time (2 threads, widths 32 to 128).
# On a GPU they fit: 8 pictures of 512×512 take 1 GB for each tensor of 128 channels in float32.
PIXELS_AT_ONCE, PIXELS_ON_A_GPU = 2**16, 2**21


@dataclass(frozen=True)
class AutoencoderConfig(ModelConfig):
    """Keys and defaults of AutoencoderKL; the block types, when not given, are one for each width."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[int, ...] = (64,)  # one width for each level; each level but the last halves the sides
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32  # side of the pictures it was trained on, a note for the reader
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True  # whether it overflows in float16: a note for the caller, who picks the data type
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    class_name: ClassVar[str] = "AutoencoderKL"
    fixed: ClassVar[Mapping[str, Any]] = {"latents_mean": None, "latents_std": None}

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            object.__setattr__(self, key, getattr(self, key) or (kind,) * levels)
            check_value(key, getattr(self, key), (kind,) * levels)
        check_value("act_fn", self.act_fn, "silu", "swish")
        check_groups(self.block_out_channels, self.norm_num_groups)
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor={self.scaling_factor!r} must be positive: 1 / std of the raw latents.")


@dataclass(frozen=True)
class Posterior:
    """The normal distribution q(latent | picture), elementwise, in float32 or better.

    `mean` and `logvar` [B, C, h, w] are those of the scaled latent. `shift` and `scale` lead back to the raw one,
    z = latent / scale + shift.
    """

    mean: Tensor
    logvar: Tensor  # log of the variance; -inf where the encoder is deterministic
    shift: float = 0.0
    scale: float = 1.0

    @property
    def mode(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise; noise: standard normal, shaped like the mean (Kingma & Welling, 2014, section 2.4)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.dtype)

    def kl(self) -> Tensor:
        """KL(q(z | picture) || N(0, I)) of the RAW latent z, in nats, summed over a picture: [B].

        Kingma & Welling (2014), appendix B. Raw, because that is the prior under which AutoencoderKL is trained:
        scaling_factor is measured when training is over, so in scaled units the same weight of the KL would
        mean another objective for each scaling factor. (After `fold_latent_statistics` the raw latent is another
        one: fold when training is over, too.)
        """
        mean = self.mean / self.scale + self.shift
        logvar = self.logvar - 2 * math.log(self.scale)
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


class DownBlock(nn.Module):
    """Residual blocks of one level of the encoder, then halving."""

    def __init__(self, in_channels: int, out_channels: int, *, layers: int, groups: int, downsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups=groups, eps=NORM_EPS) for a, b in pairwise(widths))
        self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks of one level of the decoder, then doubling."""

    def __init__(self, in_channels: int, out_channels: int, *, layers: int, groups: int, upsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups=groups, eps=NORM_EPS) for a, b in pairwise(widths))
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, with attention between them."""

    def __init__(self, channels: int, *, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups, eps=NORM_EPS) for _ in range(2))
        self.attentions = nn.ModuleList(
            [ImageAttention(channels, heads=1, groups=groups, eps=NORM_EPS)] if attention else []
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """[B, in_channels, H, W] -> [B, 2 * latent_channels, H / downscale, W / downscale]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                widths[max(i - 1, 0)],
                width,
                layers=config.layers_per_block,
                groups=groups,
                downsample=i < len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups=groups, attention=config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """[B, latent_channels, h, w] -> [B, out_channels, h * downscale, w * downscale]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups=groups, attention=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                widths[max(i - 1, 0)],
                width,
                layers=config.layers_per_block + 1,
                groups=groups,
                upsample=i < len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(Network):
    """Pictures to latents and back; `load_state_dict(strict=True)` takes AutoencoderKL's weights.

    Attributes:
        downscale: pixels per latent along one side, 8 for KL-f8.
        latent_channels: channels of a latent.
    """

    config_class = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self.scale = config.scaling_factor
        self.shift = config.shift_factor or 0.0
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

    def encode(self, images: Tensor) -> Posterior:
        """images: [B, in_channels, H, W] in [-1, 1] -> posterior of the latents [B, C, H / downscale, W / downscale].

        Raises:
            ValueError: a side of the pictures is not a multiple of `downscale`.
        """
        _check_sides(images, self.config.in_channels, self.downscale)
        moments = _in_parts(self.encoder, images.to(self.dtype), images.shape[2] * images.shape[3])
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        if moments.dtype != torch.float64:
            moments = moments.float()
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0)  # AutoencoderKL's bounds: exp stays finite in float32
        return Posterior((mean - self.shift) * self.scale, logvar + 2 * math.log(self.scale), self.shift, self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [B, latent_channels, h, w], scaled -> images [B, out_channels, h * downscale, w * downscale].

        Images are in [-1, 1] but for the network's overshoot: clamp them to show them, not to train on them.
        """
        z = (latents / self.scale + self.shift).to(self.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return _in_parts(self.decoder, z, z.shape[2] * z.shape[3] * self.downscale**2)

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        halved: bool = False,
        turns: int = 0,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Posterior, Tensor | None]:
        """One training pass.

        Args:
            images: [B, in_channels, H, W] in [-1, 1].
            noise: standard normal like the latents, [B, C, h, w]; None takes the posterior's mode.
            halved: whether the latents, averaged over 2×2, are decoded as well.
            turns: quarters by which these are turned before.
            added: to the latents, before they are decoded: [B, C, h, w].

        Returns:
            The reconstruction of a sample of the posterior, or of its mode without noise; the posterior; with `halved`
            what the same latents give at half their resolution, turned by so many quarters and the picture back again,
            [B, out_channels, H / 2, W / 2].
        """
        posterior = self.encode(images)
        latents = posterior.mode if noise is None else posterior.sample(noise)
        latents = latents if added is None else latents + added
        output = self.decode(latents)
        if not halved:
            return output, posterior, None
        small = torch.rot90(F.avg_pool2d(latents, 2), turns, (2, 3))
        return output, posterior, torch.rot90(self.decode(small), -turns, (2, 3))

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adversarial loss is balanced against the others."""
        return self.decoder.conv_out.weight

    @torch.no_grad()
    def fold_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Changes the weights so that `encode` gives (latent - mean) / std where it gave latent; `decode` undoes it.

        Afterwards `scaling_factor` alone yields latents of zero mean and unit variance in each channel, also for
        tools that know nothing else. decode(encode(images)) stays the same (unless a log-variance was clamped).

        Args:
            mean, std: [latent_channels], measured over the latents that `encode` gives now.

        Raises:
            ValueError: a standard deviation that is not positive, or a config without the two 1x1 convolutions.
        """
        if self.quant_conv is None or self.post_quant_conv is None:
            raise ValueError(
                "Latent statistics are folded into quant_conv and post_quant_conv, which this config omits."
            )
        channels = self.latent_channels
        mean, std = (x.detach().cpu().double().reshape(-1) for x in (mean, std))
        if mean.numel() != channels or std.numel() != channels:
            raise ValueError(f"Expected {channels} means and deviations, got {mean.numel()} and {std.numel()}.")
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError(f"Means must be finite and deviations positive, got {mean.tolist()} and {std.tolist()}.")
        # In raw units: z' = (z - centre) / std, where z' is the new raw latent, so that (z' - shift) * scale is
        # ((z - shift) * scale - mean) / std.
        centre = self.shift + mean / self.scale - std * self.shift
        quant, post = self.quant_conv, self.post_quant_conv
        weight, bias = (p.cpu().double() for p in (quant.weight, quant.bias))  # type: ignore[union-attr]
        weight[:channels] /= std[:, None, None, None]
        bias[:channels] = (bias[:channels] - centre) / std
        bias[channels:] -= 2 * std.log()  # the second half of the rows gives the log-variances
        quant.weight.copy_(weight)
        quant.bias.copy_(bias)  # type: ignore[union-attr]
        weight, bias = (p.cpu().double() for p in (post.weight, post.bias))  # type: ignore[union-attr]
        post.bias.copy_(bias + weight[:, :, 0, 0] @ centre)  # type: ignore[union-attr]
        post.weight.copy_(weight * std[:, None, None])


class Identity(nn.Module):
    """The autoencoder of diffusion in pixel space: latents are the pictures, with no variance.

    With 1 channel they are grey: of a coloured picture the mean over its colours, and a grey one has three equal ones.
    """

    downscale = 1

    def __init__(self, channels: int = 3):
        super().__init__()
        self.latent_channels = channels

    def encode(self, images: Tensor) -> Posterior:
        """images: [B, 3, H, W], or [B, channels, H, W] -> a posterior that is the picture itself."""
        if self.latent_channels == 1 and images.ndim == 4 and images.shape[1] == 3:
            images = images.mean(1, keepdim=True)
        _check_sides(images, self.latent_channels, 1)
        return Posterior(images, torch.full_like(images, -math.inf))

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [B, channels, H, W] -> [B, 3, H, W] where they are grey, else the same."""
        return latents.expand(-1, 3, -1, -1) if self.latent_channels == 1 else latents


def _in_parts(network: nn.Module, x: Tensor, pixels: int) -> Tensor:
    """network(x); where no gradient is asked for, few pictures of so many pixels at a time."""
    if torch.is_grad_enabled():
        return network(x)
    at_once = PIXELS_AT_ONCE if x.device.type == "cpu" else PIXELS_ON_A_GPU
    return torch.cat([network(part) for part in x.split(max(1, at_once // pixels))])


def _check_sides(images: Tensor, channels: int, downscale: int) -> None:
    if images.ndim != 4 or images.shape[1] != channels or any(s == 0 or s % downscale for s in images.shape[2:]):
        raise ValueError(
            f"Got pictures of shape {tuple(images.shape)}; expected [B, {channels}, H, W] with H and W multiples of "
            f"{downscale}: resize or crop them."
        )
