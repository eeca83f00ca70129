"""How far two sets of pictures are apart, as functions of their features; float64 throughout.

Features are [N, d], what a network (`train.extractors`) has of a picture; x_i of one set, y_j of the other.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from train.data import generator

ROWS = 1024  # of a matrix of distances that is in memory at once


@dataclass
class Moments:
    """Mean and covariance of features that come in parts and are not kept."""

    count: int
    mean: Tensor  # [d] float64
    scatter: Tensor  # sum of (x - mean)(x - mean)ᵀ, [d, d] float64

    @classmethod
    def of(cls, parts: Iterable[Tensor]) -> Self:
        """Of all features in parts [n, d], one after the other (Chan, Golub & LeVeque, 1979, equation 2.1b)."""
        found: Self | None = None
        for part in parts:
            x = part.double()
            mean = x.mean(0)
            own = cls(len(x), mean, (x - mean).T @ (x - mean))
            found = own if found is None else found.with_(own)
        if found is None:
            raise ValueError("no features: expected those of two pictures or more")
        return found

    def with_(self, other: Self) -> Self:
        """Of both."""
        count, apart = self.count + other.count, other.mean - self.mean
        between = self.count * other.count / count * torch.outer(apart, apart)
        mean = self.mean + apart * (other.count / count)
        return type(self)(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """[d, d], unbiased."""
        if self.count < 2:
            raise ValueError(f"the covariance of {self.count} picture(s): expected two or more")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of the Gaussians with these moments (Dowson & Landau, 1982).

    FID is this distance where the features are Inception's (Heusel et al., arXiv:1706.08500, equation 6), and only
    there. C_a C_b has the eigenvalues of the symmetric C_a^½ C_b C_a^½, which exist whatever the ranks.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt()
    both = torch.linalg.eigvalsh(root.T @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * both
    return max(0.0, float(distance))


class Spread(NamedTuple):
    mean: float
    deviation: float  # standard deviation over the subsets


def kernel_distance(x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000) -> Spread:
    """Squared maximum mean discrepancy under k(x, y) = (x·y / d + 1)³, its unbiased estimator, over random subsets:
    KID where the features are Inception's (Bińkowski et al., arXiv:1801.01401, section 4).

    size: pictures of each set in a subset; half of the smaller set, where that is less: subsets that are nearly the
    same few pictures would say that the spread is nothing.
    """
    size = min(size, len(x) // 2, len(y) // 2)
    if size < 2:
        raise ValueError(f"a kernel distance of {len(x)} and {len(y)} pictures: expected four or more of each")
    found = []
    for i in range(subsets):
        draw = generator(0, i)
        a, b = (z[torch.randperm(len(z), generator=draw)[:size]].double() for z in (x, y))
        aa, bb, ab = (_cubic(u, v) for u, v in ((a, a), (b, b), (a, b)))
        within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
        found.append(within / (size * (size - 1)) - 2 * ab.mean())
    every = torch.stack(found)
    return Spread(float(every.mean()), float(every.std(correction=0)))


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


class Support(NamedTuple):
    precision: float  # share of the samples that lie within the support of the real pictures
    recall: float  # share of the real pictures that lie within the samples' own


def precision_recall(real: Tensor, samples: Tensor, k: int = 3) -> Support:
    """The shares of each set that lie inside the other's support: no further from one of its pictures than that one's
    own k-th neighbour is (Kynkäänniemi et al., arXiv:1904.06991, equations 1 to 3)."""
    if min(len(real), len(samples)) <= k:
        raise ValueError(
            f"precision of {len(samples)} samples and {len(real)} pictures: expected more than {k} of each"
        )
    return Support(_inside(samples, real, k), _inside(real, samples, k))


def _inside(points: Tensor, support: Tensor, k: int) -> float:
    radius = nearest(support, support, k + 1).values[:, k]  # the first neighbour is the picture itself
    inside = [(distances <= radius).any(1) for distances in _distances(points, support)]
    return float(torch.cat(inside).double().mean())


class Neighbours(NamedTuple):
    values: Tensor  # distances, [N, k], the smallest first
    indices: Tensor  # [N, k]


def nearest(points: Tensor, among: Tensor, k: int = 1) -> Neighbours:
    """The k nearest of `among` to each point, by Euclidean distance."""
    found = [distances.topk(min(k, len(among)), largest=False) for distances in _distances(points, among)]
    return Neighbours(torch.cat([f.values for f in found]), torch.cat([f.indices for f in found]))


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """The matrix of distances, at most ROWS rows at a time; in float64 no near pair drowns in rounding."""
    b = b.double()
    for part in a.split(ROWS):
        yield torch.cdist(part.double(), b)


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean of 100 max(cos, 0) over pairs of embeddings, [N, E] each (Hessel et al., arXiv:2104.08718, scaled by 100 as
    torchmetrics has it)."""
    cosine = torch.nn.functional.cosine_similarity(images.double(), texts.double())
    return float(100 * cosine.clamp(min=0).mean())


def diversity(features: Tensor, groups: Sequence[str]) -> tuple[float, int]:
    """Mean distance between two pictures of one group, such as one prompt, averaged over groups; and how many groups
    have two pictures. (nan, 0) where none has."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    means = []
    for rows in members.values():
        if len(rows) > 1:
            total = sum(float(part.sum()) for part in _distances(features[rows], features[rows]))
            means.append(total / (len(rows) * (len(rows) - 1)))
    return (math.fsum(means) / len(means), len(means)) if means else (math.nan, 0)


def psnr(output: Tensor, images: Tensor) -> Tensor:
    """dB of each of two batches' pictures in [-1, 1], at most 100: [B]."""
    error = ((output.float() - images.float()) / 2).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()
