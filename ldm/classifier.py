"""A classifier of noisy pictures, p(y | x; sigma) at every noise level, and its loss: what classifier guidance needs.

It works in x = x_0 + sigma * eps as all of `ldm` does, on EDM's input and clock. So one classifier guides models of any
path, as long as their data are the same: `guidance.classifier_guided(denoise, partial(classifier.log_prob, labels=y))`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.blocks import (
    Downsample,
    ModelConfig,
    Network,
    ResnetBlock,
    TimestepEmbedding,
    check_groups,
    timestep_embedding,
)
from ldm.denoiser import noised, per_picture, widened
from ldm.schedule import EDM

WAVES = 64  # sines and cosines of the clock


@dataclass(frozen=True)
class NoisyClassifierConfig(ModelConfig):
    """One entry a level in `block_out_channels`; each level but the last halves the sides."""

    labels: tuple[str, ...] = ()  # names of the classes, in the order of the logits
    in_channels: int = 1  # of the latents, or of the pixels
    sample_size: int = 32  # side of what it was trained on, a note for the reader
    sigma_data: float = 1.0  # standard deviation of the data; latents have about 1, pixels 0.5
    block_out_channels: tuple[int, ...] = (32, 64, 128)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    dropout: float = 0.0

    class_name: ClassVar[str] = "NoisyClassifier"
    fixed: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        check_groups(self.block_out_channels, self.norm_num_groups)
        if self.layers_per_block < 1:
            raise ValueError(f"layers_per_block={self.layers_per_block} should be at least 1.")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels={self.labels} should differ from one another.")


class NoisyClassifier(Network):
    """The downward half of a U-Net, told the noise level, then the mean over positions (Dhariwal & Nichol,
    arXiv:2105.05233, section 4; without its attention, and without a normalisation at the end, which would forget how
    much speaks for a class). At first every class is as likely as another.

    Raises:
        ValueError: a config of fewer than two classes.
    """

    config_class = NoisyClassifierConfig

    def __init__(self, config: NoisyClassifierConfig):
        super().__init__()
        if len(config.labels) < 2:
            raise ValueError(f"a classifier needs the names of at least two classes, got labels={config.labels}")
        self.config = config
        self.schedule = EDM(config.sigma_data)
        widths, groups, layers = config.block_out_channels, config.norm_num_groups, config.layers_per_block
        time = 4 * widths[0]
        self.time_embedding = TimestepEmbedding(WAVES, time)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.layers = nn.ModuleList()
        for level, (before, width) in enumerate(pairwise((widths[0], *widths))):
            if level:
                self.layers.append(Downsample(before, padding=1))
            for a, b in pairwise([before] + [width] * layers):
                options: dict[str, Any] = {"time_channels": time, "scale_shift": True, "dropout": config.dropout}
                self.layers.append(ResnetBlock(a, b, groups=groups, eps=1e-5, **options))
        self.linear_out = nn.Linear(widths[-1], len(config.labels))
        self.prior = nn.Parameter(torch.zeros(len(config.labels)))
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Logits of p(y | x; sigma).

        What depends on x is scaled by d / sqrt(d² + sigma²), because the truth fades so (for classes N(mean, d²) it is
        x mean / (d² + sigma²)). Unscaled, an error in the gradient would grow by sigma on its way into D.

        Args:
            x: [B, C, H, W], x_0 + sigma * eps, sides of any length.
            sigma: noise level above 0, [B] or one number.

        Returns:
            [B, classes], float32 or better.
        """
        x = widened(x)
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        scale = self.schedule.alpha(sigma)
        # 16 radians where sigma grows e-fold: as fine as what a classifier sees changes with the level.
        waves = timestep_embedding(64 * self.schedule.timestep(sigma), WAVES, cosine_first=True, freq_shift=0)
        time = F.silu(self.time_embedding(waves.to(self.dtype)))
        h = self.conv_in((per_picture(scale, x) * x).to(self.dtype))
        for layer in self.layers:
            h = layer(h, time) if isinstance(layer, ResnetBlock) else layer(h)
        logits = self.linear_out(F.silu(h).mean((2, 3)))
        return self.prior.to(x.dtype) + (self.config.sigma_data * scale)[:, None] * logits.to(x.dtype)

    def log_prob(self, x: Tensor, sigma: Tensor | float, labels: Tensor) -> Tensor:
        """log p(y | x; sigma): [B].

        Args:
            x, sigma: as of `forward`.
            labels: y, [B], places in `config.labels`.
        """
        # The clone is an ordinary tensor where the labels were made in inference mode, which has no gradients.
        return -F.cross_entropy(self(x, sigma), labels.clone(), reduction="none")


def classification_loss(classifier: nn.Module, x0: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Cross-entropy at x = x_0 + sigma * noise, least where the classifier is p(y | x; sigma): [B], in nats.

    Args:
        classifier: a `NoisyClassifier`, or what wraps it for several processes.
        x0: clean latents, [B, C, H, W].
        labels: [B].
        sigma: noise levels, [B].
        noise: standard normal, like x0.
    """
    return F.cross_entropy(classifier(noised(x0, sigma, noise), sigma), labels, reduction="none")
