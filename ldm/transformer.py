"""The transformer inside the U-Net: how positions of the latent look at each other and at the text."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.blocks import AttentionLayer, attend, to_picture, to_tokens


@dataclass(frozen=True)
class TextContext:
    """What the cross-attention looks at."""

    states: Tensor  # [B, M, context_channels]
    mask: Tensor | None  # added to the scores, [B, 1, 1, M]
    projected: dict[nn.Module, tuple[Tensor, Tensor]] | None = None  # keys and values kept from earlier calls


class Attention(AttentionLayer):
    """Attention of tokens to themselves, or to a context of `context_channels`."""

    def __init__(self, channels: int, *, heads: int, context_channels: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, tokens: Tensor, context: TextContext | None = None) -> Tensor:
        """tokens: [B, N, channels] -> the same shape."""
        if context is None:
            key, value, mask = self.to_k(tokens), self.to_v(tokens), None
        else:
            (key, value), mask = self._project(context), context.mask
        return self.to_out[0](attend(self.to_q(tokens), key, value, self.heads, mask, self.backend))

    def _project(self, context: TextContext) -> tuple[Tensor, Tensor]:
        if context.projected is None:
            return self.to_k(context.states), self.to_v(context.states)
        if self not in context.projected:
            context.projected[self] = (self.to_k(context.states), self.to_v(context.states))
        return context.projected[self]


class GatedLinear(nn.Module):
    """value * gelu(gate) of two linear maps (GEGLU; Shazeer, 2020, equation 5)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers, four times as wide between them."""

    def __init__(self, channels: int):
        super().__init__()
        # The second entry stands where other implementations drop out: the weights' names count it.
        self.net = nn.Sequential(GatedLinear(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Attention to itself, attention to the context, feed-forward; each on a normed copy and added."""

    def __init__(self, channels: int, *, heads: int, context_channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads=heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads=heads, context_channels=context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, tokens: Tensor, context: TextContext) -> Tensor:
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        return tokens + self.ff(self.norm3(tokens))


class PictureTransformer(nn.Module):
    """Transformer over the positions of a picture, beside a shortcut (Rombach et al., 2022, section 3.3)."""

    def __init__(
        self, channels: int, *, heads: int, layers: int, groups: int, context_channels: int, linear_projection: bool
    ):
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads=heads, context_channels=context_channels) for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: TextContext) -> Tensor:
        """x: [B, channels, H, W] -> the same shape."""
        size = (x.shape[2], x.shape[3])
        h = self.norm(x)
        tokens = self.proj_in(to_tokens(h)) if self.linear_projection else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        if self.linear_projection:
            return x + to_picture(self.proj_out(tokens), size)
        return x + self.proj_out(to_picture(tokens, size))
