"""A small network for vectors: points of the plane, and codes of pictures. It has a layout of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.blocks import TimestepEmbedding, timestep_embedding

WAVES = 64  # sines and cosines of the clock


class Layer(nn.Module):
    """A residual layer whose normalised input is scaled and shifted by the condition, as ResnetBlock's scale_shift."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.condition = nn.Linear(width, 2 * width)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.condition(condition).chunk(2, dim=1)
        h = self.linear_1(torch.addcmul(shift, self.norm(x), 1 + scale))
        return x + self.linear_2(F.silu(h))


class MLP(nn.Module):
    """Predicts from a noisy vector and the time; begins at zero.

    Args:
        dim: of the vectors.
        width: of the layers.
        depth: number of residual layers.
        num_class_embeds: classes and their null; None: unconditional.
        dim_out: of what it puts out; None: dim. Twice that where the variance is learned.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 128,
        depth: int = 3,
        num_class_embeds: int | None = None,
        dim_out: int | None = None,
    ):
        super().__init__()
        if min(dim, width, depth) < 1:
            raise ValueError(f"an MLP needs dim, width and depth of at least 1, got {dim=}, {width=}, {depth=}")
        self.linear_in = nn.Linear(dim, width)
        self.time_embedding = TimestepEmbedding(WAVES, width)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.linear_out = nn.Linear(width, dim_out or dim)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Args:
            sample: [B, dim], the network's `x_t`.
            timestep: [B] or one number, of any of the clocks: rows of a beta table, the flow's t, log(sigma) / 4.
            class_labels: [B], where there are classes.

        Returns:
            [B, dim_out].

        Raises:
            ValueError: labels that the network needs and did not get, or got and has no use for.
        """
        if (class_labels is None) != (self.class_embedding is None):
            wanted = "needs class_labels [B]" if class_labels is None else "has no classes: leave class_labels out"
            raise ValueError(f"This network {wanted}.")
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        # From 4 radians a unit, for clocks that run over one or two units, to 0.4 over a table's thousand rows.
        waves = timestep_embedding(4 * timestep, WAVES, cosine_first=True, freq_shift=0)
        condition = self.time_embedding(waves.to(sample.dtype))
        if self.class_embedding is not None and class_labels is not None:
            condition = condition + self.class_embedding(class_labels)
        condition = F.silu(condition)
        x = self.linear_in(sample)
        for layer in self.layers:
            x = layer(x, condition)
        return self.linear_out(x)
