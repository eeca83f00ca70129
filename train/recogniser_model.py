"""The network that says what clean pictures show; `train.recogniser` trains it.

It is that of K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv:2404.00498), of any width and depth,
with an answer for each task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.blocks import ModelConfig, Network
from pipelines.files import newest, open_network
from train.answers import Tasks

BEFORE_LOGITS = 1 / 9  # that paper's: logits of an untrained network are small


@dataclass(frozen=True)
class RecogniserConfig(ModelConfig):
    """Each entry of `widths` is a block, which halves the sides."""

    tasks: Tasks = ()  # name of what is asked -> names of the answers
    in_channels: int = 3  # 1: pictures are made grey
    sample_size: int = 32  # side to which pictures are brought, in pixels
    widths: tuple[int, ...] = (32, 128, 128)

    class_name: ClassVar[str] = "Recogniser"
    fixed: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        if self.in_channels not in (1, 3):
            raise ValueError(f"in_channels={self.in_channels}: expected 1 (grey) or 3")
        if not self.widths or min(self.widths) < 1 or self.sample_size < 2 ** len(self.widths) + 1:
            raise ValueError(
                f"widths={self.widths} at {self.sample_size} pixels: expected at least one, and sides of more than "
                f"{2 ** len(self.widths)} pixels for so many halvings"
            )


class Recogniser(Network):
    """Pictures [B, C, H, W] in [-1, 1] to logits.

    The first layer is 2×2 patches along their principal axes, set by `whiten` and not trained.

    Raises:
        ValueError: a config with no task, or a task with fewer than two answers.
    """

    config_class = RecogniserConfig

    def __init__(self, config: RecogniserConfig):
        super().__init__()
        if not config.tasks or any(len(answers) < 2 for _, answers in config.tasks):
            raise ValueError(f"tasks={config.tasks}: expected at least one, each with the names of two answers or more")
        self.config = config
        patches = 2 * 4 * config.in_channels
        self.conv_in = nn.Conv2d(config.in_channels, patches, 2)
        self.conv_in.weight.requires_grad_(False)
        self.blocks = nn.ModuleList(_Block(a, b) for a, b in pairwise((patches, *config.widths)))
        self.linear_out = nn.Linear(config.widths[-1], sum(len(answers) for _, answers in config.tasks), bias=False)

    @property
    def dim(self) -> int:
        """Number of features."""
        return self.config.widths[-1]

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Sets the first layer: the eigenvectors of 2×2 patches by the root of their eigenvalues, and their negatives.

        images: [N, C, H, W], some thousand pictures of the kind.
        """
        moment, count = torch.zeros(4 * images.shape[1], 4 * images.shape[1], dtype=torch.float64), 0
        for some in images.split(64):
            patches = F.unfold(some.double(), 2).transpose(1, 2).flatten(0, 1)
            moment, count = moment + patches.T @ patches, count + len(patches)
        values, vectors = torch.linalg.eigh(moment / count)
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(-1, *self.conv_in.weight.shape[1:])
        self.conv_in.weight.copy_(torch.cat((filters, -filters)))
        nn.init.zeros_(self.conv_in.bias)  # type: ignore[arg-type]

    def features(self, images: Tensor) -> Tensor:
        """The last layer but one, [B, dim]."""
        h = F.gelu(self.conv_in(images.to(self.dtype)))
        for block in self.blocks:
            h = block(h)
        return h.amax((2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of each task, [B, answers] float32."""
        return self.answer(self.features(images))

    def answer(self, features: Tensor) -> tuple[Tensor, ...]:
        """Logits of each task from the features."""
        logits = BEFORE_LOGITS * self.linear_out(features).float()
        return logits.split([len(answers) for _, answers in self.config.tasks], dim=1)


class _Block(nn.Module):
    def __init__(self, a: int, b: int):
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(b, momentum=0.4), nn.BatchNorm2d(b, momentum=0.4)
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight[: conv.in_channels].detach())  # the first channels pass through

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


def as_seen(config: RecogniserConfig, images: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, C, H, W], as such a network takes them."""
    return images if config.in_channels == 3 else images.mean(1, keepdim=True)


def load_recogniser(where: str | Path) -> Recogniser:
    """A recogniser's folder, frozen; a training run's folder stands for its newest checkpoint. ValueError without."""
    return open_network(Recogniser, newest(Path(where).expanduser()))
