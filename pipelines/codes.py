"""The codes of a diffusion autoencoder (Preechakul et al. 2022, arXiv:2111.15640), and what can be done between them.

A picture is two codes: the semantic one, what it shows, and the stochastic one, the noise that becomes this picture of
all that show the same. Semantic codes have a diffusion of their own, for pictures of nothing given, and planes that
part the pictures with an attribute from those without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.blocks import ModelConfig, Network
from ldm.denoiser import Denoiser
from ldm.mlp import MLP
from ldm.samplers import heun
from ldm.schedule import EDM, step_grid


class Codes(NamedTuple):
    """A batch of pictures as codes."""

    semantic: Tensor  # [B, D], as the encoder gives it
    stochastic: Tensor  # [B, C, h, w], about unit normal

    def toward(self, other: "Codes", share: float) -> "Codes":
        """The codes `share` of the way to others: semantic ones on a line, stochastic ones on a great circle,
        so that they stay as long as noise is."""
        return Codes(torch.lerp(self.semantic, other.semantic, share), slerp(self.stochastic, other.stochastic, share))


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Each of [B, ...] from a (share 0) to b (share 1) at an even angle (Shoemake 1985); straight where they align."""
    one, other = (x.flatten(1).cpu().double() for x in (a, b))  # some devices have no float64
    cosine = F.cosine_similarity(one, other, dim=1)[:, None].clamp(-1, 1)
    angle = cosine.acos()
    turned = (((1 - share) * angle).sin() * one + (share * angle).sin() * other) / angle.sin()
    return torch.where(angle.sin() < 1e-4, torch.lerp(one, other, share), turned).view_as(a).to(a)


@dataclass(frozen=True)
class Attribute:
    """A plane between the semantic codes of pictures with and without something: weight · (z - mean) / std + bias = 0.

    Distances are in standard deviations of the codes that it was fitted to.
    """

    mean: Tensor  # [D]
    std: Tensor  # [D]
    weight: Tensor  # [D]
    bias: Tensor  # one number

    def logit(self, semantic: Tensor) -> Tensor:
        """log p / (1 - p) of having the attribute: [B, D] -> [B]."""
        return ((semantic - self.mean) / self.std) @ self.weight + self.bias

    def distance(self, semantic: Tensor) -> Tensor:
        """How far beyond the plane, negative on the side without: [B, D] -> [B]."""
        return self.logit(semantic) / self.weight.norm()

    def move(self, semantic: Tensor, amount: float) -> Tensor:
        """The codes moved across the plane at right angles, by as much as `distance` then grows."""
        return semantic + amount * self.std * self.weight / self.weight.norm()


def fit_attribute(semantic: Tensor, labels: Sequence[bool] | Tensor, *, decay: float = 1.0) -> Attribute:
    """Logistic regression on codes of zero mean and unit variance, by L-BFGS in float64.

    Args:
        semantic: [N, D].
        labels: for each, whether it has the attribute.
        decay: of |weight|² / 2 beside the summed loss (1 / C of scikit-learn), which keeps a plane between codes that
            are few or lie apart from growing without end.

    Raises:
        ValueError: another number of labels than of codes, or pictures of one kind alone.
    """
    wanted = torch.as_tensor(labels).cpu().double()
    if wanted.shape != semantic.shape[:1] or not set(wanted.tolist()) <= {0.0, 1.0}:
        raise ValueError(f"labels: expected {len(semantic)} times True or False, one for each picture; got {labels!r}")
    if wanted.min() == wanted.max():
        raise ValueError(f"labels: all {len(wanted)} are {bool(wanted[0])}; expected pictures with and without")
    z = semantic.detach().cpu().double()  # some devices have no float64
    mean, std = z.mean(0), z.std(0).clamp(min=1e-6)
    z = (z - mean) / std
    plane = torch.zeros(z.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [plane], max_iter=500, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(z @ plane[:-1] + plane[-1], wanted, reduction="sum")
        loss = (loss + decay * plane[:-1].square().sum() / 2) / len(z)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    found = plane.detach()
    return Attribute(*(value.to(semantic) for value in (mean, std, found[:-1], found[-1])))


@dataclass(frozen=True)
class CodesConfig(ModelConfig):
    """config.json of a `CodeDiffusion`."""

    dim: int  # numbers in a code
    width: int = 256
    depth: int = 4

    class_name: ClassVar[str] = "CodeDiffusion"
    fixed: ClassVar[Mapping[str, Any]] = {}


class CodeDiffusion(Network):
    """The second diffusion, of semantic codes brought to zero mean and unit variance (section 4 of the paper): EDM's
    denoiser, sampled by its Heun's method."""

    config_class = CodesConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: CodesConfig):
        super().__init__()
        self.config = config
        self.network = MLP(config.dim, width=config.width, depth=config.depth)
        self.register_buffer("mean", torch.zeros(config.dim))
        self.register_buffer("std", torch.ones(config.dim))

    @property
    def denoiser(self) -> Denoiser:
        """Of normalised codes."""
        return Denoiser(self.network, EDM(1.0), "edm")

    def normalised(self, semantic: Tensor) -> Tensor:
        """Codes [B, D] as the denoiser knows them."""
        return (semantic - self.mean) / self.std

    def sample(self, noise: Tensor, steps: int = 50) -> Tensor:
        """Semantic codes from unit normal noise, [B, D] -> [B, D]."""
        sigmas = step_grid(EDM(1.0), steps, "karras")
        codes = heun(self.denoiser, noise * float(1 + sigmas[0] ** 2) ** 0.5, sigmas)
        return codes * self.std + self.mean
