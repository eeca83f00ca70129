"""What the U-Net and the autoencoder share: configs and weights that other tools can open, and layers, with the
parameter names of diffusers' modules.

Pictures are [B, C, H, W], tokens [B, N, C]. Every layer keeps the memory format it is given: with `channels_last` a
picture is already a list of tokens in memory, and turning one into the other costs nothing.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The release whose config keys these are; readers of a folder look at it to see how old its conventions are.
DIFFUSERS_VERSION = "0.35.0"


class ModelConfig:
    """Base of the frozen dataclasses that hold a diffusers `config.json`.

    `class_name` is diffusers' name of the model; `fixed` holds the keys of which only one value is implemented.
    """

    class_name: ClassVar[str]
    fixed: ClassVar[Mapping[str, Any]]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads a `config.json`; keys that begin with an underscore are notes of the library that wrote it.

        Raises:
            ValueError: a key that does not exist, or a value that is not implemented, by name.
        """
        name = values.get("_class_name", cls.class_name)
        if name != cls.class_name:
            raise ValueError(f"This config is of a {name}; expected one of a {cls.class_name}.")
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        arguments = {}
        for key, value in values.items():
            if key.startswith("_"):
                continue
            if key in known:
                arguments[key] = _tuples(value)
            elif key not in cls.fixed:
                raise ValueError(f"{cls.class_name} has no config key {key!r} (value {value!r}): remove it.")
            elif _tuples(value) != cls.fixed[key]:
                raise ValueError(f"{key}={value!r} is not implemented: only {key}={cls.fixed[key]!r} is.")
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` that diffusers opens."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return {"_class_name": self.class_name, "_diffusers_version": DIFFUSERS_VERSION, **values}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def check_value(key: str, value: Any, *allowed: Any) -> None:
    """Refuses by name a config value that is not implemented."""
    if value not in allowed:
        raise ValueError(f"{key}={value!r} is not implemented: expected {' or '.join(map(repr, allowed))}.")


def check_groups(widths: tuple[int, ...], groups: int) -> None:
    """Group norm needs every width to be a multiple of the number of groups."""
    if not widths or any(width <= 0 or width % groups for width in widths):
        raise ValueError(f"block_out_channels={widths} must all be multiples of norm_num_groups={groups}.")


_OLD_ATTENTION_KEYS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_old_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the attention weights of folders written before diffusers 0.16, as Stable Diffusion's own autoencoders
    are (`query`, `key`, `value`, `proj_attn`); other keys stay."""
    renamed = {}
    for key, value in state.items():
        layer, _, rest = key.rpartition(".")
        parent, _, name = layer.rpartition(".")
        if name in _OLD_ATTENTION_KEYS and ".attentions." in f".{parent}.":
            key = f"{parent}.{_OLD_ATTENTION_KEYS[name]}.{rest}"
        renamed[key] = value
    return renamed


class AttentionLayer(nn.Module):
    """A layer whose attention `Network.set_attention` can hand to another backend."""

    backend = "sdpa"


class Network(nn.Module):
    """A module with a config and weights that other tools can open; it is built from the config alone."""

    config_class: ClassVar[type[ModelConfig]]
    exact: ClassVar[tuple[str, ...]] = ()  # buffers that are never brought to 16 bits

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Self:
        """Builds the network, with new weights, from the contents of a `config.json`."""
        return cls(cls.config_class.from_dict(values))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in PyTorch; the attention keys of old folders are understood as well."""
        return super().load_state_dict(rename_old_keys(state_dict), strict=strict, assign=assign)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `to` and its like do: moves and casts everything, but moves alone what is `exact`."""
        kept = {name: getattr(self, name) for name in self.exact}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if not value.is_meta:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def set_attention(self, backend: str) -> None:
        """Chooses who computes the attention: "sdpa" (PyTorch, the default) or "xformers".

        Raises:
            ValueError: an unknown name, or xformers where it can't run, with the reason.
        """
        if backend not in ("sdpa", "xformers"):
            raise ValueError(f"attention backend {backend!r}: expected 'sdpa' or 'xformers'.")
        if backend == "xformers":
            _check_xformers(next(self.parameters()).device)
        for module in self.modules():
            if isinstance(module, AttentionLayer):
                module.backend = backend


def _check_xformers(device: torch.device) -> None:
    advice = "or keep attention at 'sdpa', which runs everywhere."
    if device.type != "cuda":
        raise ValueError(
            f"xformers' attention runs on CUDA devices only, and the network is on {device}: move it to one, {advice}"
        )
    try:
        import xformers.ops
    except ImportError as error:
        raise ValueError(
            f"xformers is not installed ({error}): pip install 'atelier-diffusion[xformers]', {advice}"
        ) from error
    try:
        probe = torch.zeros(1, 8, 1, 8, device=device, dtype=torch.float16)
        xformers.ops.memory_efficient_attention(probe, probe, probe)
    except RuntimeError as error:
        raise ValueError(
            f"xformers does not work with this PyTorch and this device ({error}): update it, {advice}"
        ) from error


class ResnetBlock(nn.Module):
    """norm, SiLU, convolution, twice, beside a shortcut; the embedding of the time is added (or scales and shifts)
    in between.

    Args:
        time_channels: width of the time embedding; none: the block does not know the time.
        scale_shift: `resnet_time_scale_shift="scale_shift"` (Dhariwal & Nichol, 2021, section 3).
        output_scale: the sum is divided by it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_channels: int | None = None,
        dropout: float = 0.0,
        scale_shift: bool = False,
        output_scale: float = 1.0,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.output_scale = output_scale
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x: [B, in, H, W]; time: [B, time_channels], already through its SiLU -> [B, out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        if time is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = self.time_emb_proj(time)[:, :, None, None].chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + self.time_emb_proj(time)[:, :, None, None])
        h = self.conv2(self.dropout(F.silu(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h if self.output_scale == 1.0 else (x + h) / self.output_scale


def timestep_embedding(timestep: Tensor, channels: int, *, cosine_first: bool, freq_shift: float) -> Tensor:
    """Sines and cosines of t * 10000^(-i / (channels / 2 - freq_shift)) (Ho et al., 2020, appendix B), in float32.

    timestep: [B], fractions allowed -> [B, channels].
    """
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / (half - freq_shift)
    angle = timestep.float()[:, None] * exponent.exp()
    waves = (angle.cos(), angle.sin()) if cosine_first else (angle.sin(), angle.cos())
    return F.pad(torch.cat(waves, dim=1), (0, channels % 2))


class TimestepEmbedding(nn.Module):
    """[B, in] -> [B, out], two layers."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Downsample(nn.Module):
    """Halves the sides by a convolution. padding 1 pads all sides, padding 0 the right and lower side only."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides, or brings them to `size` (height, width), by repetition; then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            size = (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C], a view."""
    return x.flatten(2).transpose(1, 2)


def to_picture(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H * W, C] -> [B, C, H, W], a view."""
    return tokens.transpose(1, 2).unflatten(2, size)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None, backend: str) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for each head (Vaswani et al., 2017, equation 1).

    Every backend accumulates the scores in float32, which is what `upcast_attention` was made for.

    Args:
        query: [B, N, heads * d]; key and value: [B, M, heads * d].
        mask: added to the scores, [B, 1, 1, M].
        backend: "sdpa" (PyTorch's own) or "xformers".

    Returns:
        [B, N, heads * d].
    """
    q, k, v = (x.unflatten(2, (heads, -1)) for x in (query, key, value))  # [B, N, heads, d]
    if mask is not None:
        mask = mask.to(q.dtype)
    if backend == "xformers":
        if query.device.type != "cuda":
            raise ValueError(f"xformers can't run on {query.device}: set_attention('sdpa') before moving the network")
        from xformers.ops import memory_efficient_attention

        if mask is not None:  # its kernels want rows of keys that begin at multiples of 8 elements
            keys = mask.shape[-1]
            mask = F.pad(mask, (0, -keys % 8)).expand(-1, heads, q.shape[1], -1)[..., :keys]
        return memory_efficient_attention(q, k, v, attn_bias=mask).flatten(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, N, d]
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # Forward and backward in bfloat16 it takes up to three times as long there as in float32 (0.93 and 0.31 ms a
        # picture of 64 positions, 4 heads of 24), and as long at a thousand positions.
        with torch.autocast("cpu", enabled=False):
            q, k, v = (x.to(x.dtype if x.dtype.itemsize > 4 else torch.float32) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if mask is None else mask.to(q.dtype))
        return attended.transpose(1, 2).flatten(2).to(query.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class ImageAttention(AttentionLayer):
    """Self-attention between the positions of a picture, with its own norm and shortcut."""

    def __init__(self, channels: int, *, heads: int, groups: int, eps: float):
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """x: [B, C, H, W] -> the same shape; the context of the other layers is nothing to this one."""
        tokens = to_tokens(self.group_norm(x))
        h = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), self.heads, None, self.backend)
        return x + to_picture(self.to_out[0](h), (x.shape[2], x.shape[3]))
