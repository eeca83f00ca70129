"""Distances between sets of features: closed forms of Gaussians, scipy and torchmetrics on the same inputs."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist, pdist
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score

from train.metrics import (
    Moments,
    clip_score,
    diversity,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_recall,
    psnr,
)

DIM = 6


def drawn(count: int, seed: int, shift: float = 0.0, dim: int = DIM) -> torch.Tensor:
    """Features with a mean and correlations of their own."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + shift).float()


class Already(torch.nn.Module):
    """Gives torchmetrics features in the place of pictures."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.num_features = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1)


def as_pictures(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None, None]


def test_moments_are_those_of_all_parts() -> None:
    x = drawn(101, 0, shift=1e4)
    whole, parts = Moments.of([x]), Moments.of(x.split(13))
    assert (whole.count, parts.count) == (101, 101)
    for moments in (whole, parts):
        assert moments.mean.numpy() == pytest.approx(x.double().numpy().mean(0))
        assert moments.covariance.numpy() == pytest.approx(np.cov(x.double().numpy().T), rel=1e-9, abs=1e-9)
    with pytest.raises(ValueError, match="no features"):
        Moments.of([])
    with pytest.raises(ValueError, match="expected two or more"):
        frechet_distance(Moments.of([x[:1]]), whole)


def of_gaussian(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    return Moments(11, torch.from_numpy(mean), 10 * torch.from_numpy(covariance))


def test_frechet_distance_of_two_gaussians() -> None:
    """With covariances that commute it is |m_a - m_b|² + |C_a^½ - C_b^½|²."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(DIM, DIM)))
    a, b, apart = rng.uniform(0.1, 2, DIM), rng.uniform(0.1, 2, DIM), rng.normal(size=DIM)
    one, other = (of_gaussian(m, basis * v @ basis.T) for m, v in ((apart, a), (0 * apart, b)))
    wanted = (apart**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-12)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)
    point = of_gaussian(0 * apart, np.zeros((DIM, DIM)))
    assert frechet_distance(one, point) == pytest.approx((apart**2).sum() + a.sum())


@pytest.mark.parametrize("count", [300, 4])  # with 4 the covariances are singular
def test_frechet_distance_as_scipy_has_it(count: int) -> None:
    x, y = drawn(count, 1), drawn(count, 2, 0.5)
    m, n = (z.double().numpy() for z in (x, y))
    root = sqrtm(np.cov(m.T) @ np.cov(n.T))
    wanted = ((m.mean(0) - n.mean(0)) ** 2).sum() + np.trace(np.cov(m.T) + np.cov(n.T)) - 2 * np.trace(root).real
    assert frechet_distance(Moments.of([x]), Moments.of([y])) == pytest.approx(wanted, rel=1e-5)
    assert frechet_distance(Moments.of([y]), Moments.of([x])) == pytest.approx(wanted, rel=1e-5)


def test_frechet_distance_as_torchmetrics_has_it() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = drawn(200, 3), drawn(150, 4, 0.3)
    theirs = fid.FrechetInceptionDistance(feature=Already(), input_img_size=(DIM, 1, 1)).set_dtype(torch.float64)
    for part in x.split(40):
        theirs.update(as_pictures(part), real=True)
    theirs.update(as_pictures(y), real=False)
    ours = frechet_distance(Moments.of(x.split(64)), Moments.of([y]))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_kernel_distance_as_torchmetrics_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same subsets: theirs, too, draws a permutation of each set and takes its first rows."""
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = drawn(60, 5), drawn(80, 6, 0.3)
    theirs = kid.KernelInceptionDistance(feature=Already(), subsets=4, subset_size=30)
    theirs.update(as_pictures(x), real=True)
    theirs.update(as_pictures(y), real=False)
    draws = [torch.Generator().manual_seed(0)]
    with monkeypatch.context() as patch:
        patch.setattr("train.metrics.generator", lambda *_: draws[0])
        ours = kernel_distance(x, y, subsets=4, size=1000)  # of which there are none: half of the smaller set
    draws[0].manual_seed(0)
    permute = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda count, **_: permute(count, generator=draws[0]))
    mean, spread = map(float, theirs.compute())
    assert ours == pytest.approx((mean, spread), rel=1e-4)
    assert ours.deviation > 0


def test_kernel_distance_is_unbiased() -> None:
    """Around zero for two sets of one kind, of whatever size, and apart for two."""
    x, y = torch.randn(2, 4000, 3, generator=torch.Generator().manual_seed(0))
    for size in (10, 300):
        mean, spread = kernel_distance(x, y, subsets=200, size=size)
        assert abs(mean) < 4 * spread / math.sqrt(200) + 1e-3
    assert kernel_distance(x, y + 1, subsets=5).mean > 1
    assert kernel_distance(x, y, subsets=5) == kernel_distance(x, y, subsets=5)
    with pytest.raises(ValueError, match="four or more of each"):
        kernel_distance(x[:3], y)


def by_definition(points: np.ndarray, support: np.ndarray, k: int) -> float:
    radius = np.sort(cdist(support, support), 1)[:, k]
    return float((cdist(points, support) <= radius).any(1).mean())


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.metrics.ROWS", 17)
    real, samples = drawn(60, 7), drawn(50, 8)
    m, n = real.double().numpy(), samples.double().numpy()
    found = precision_recall(real, samples, k)
    assert found == pytest.approx((by_definition(n, m, k), by_definition(m, n, k)))
    assert 0 < found.precision < 1
    assert precision_recall(real, real + 1e3, k) == (0, 0)
    assert precision_recall(real, real, k) == (1, 1)
    collapsed = real[:1].repeat(50, 1) + 1e-3 * torch.randn(50, DIM)  # every sample is near one real picture
    precision, recall = precision_recall(real, collapsed, k)
    assert precision == 1
    assert recall < 0.1
    with pytest.raises(ValueError, match="more than 3 of each"):
        precision_recall(real[:3], samples)


def test_neighbours() -> None:
    points, among = drawn(20, 9), drawn(30, 10)
    distances = cdist(points.double(), among.double())
    found = nearest(points, among, 2)
    assert found.indices.numpy().tolist() == np.argsort(distances, 1)[:, :2].tolist()
    assert found.values.numpy() == pytest.approx(np.sort(distances, 1)[:, :2])
    assert nearest(points, points + 1e-4).values.max() < 1e-3  # near pairs of long vectors, too
    assert nearest(1e4 + points, 1e4 + points).values.max() == 0


def test_psnr() -> None:
    """20 log10(range / deviation); the same pictures have the most that is counted, which is no infinity."""
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    noise = torch.tensor([0.2, 0.02]).view(-1, 1, 1, 1) * torch.ones_like(images)
    assert psnr(images + noise, images).tolist() == pytest.approx([20.0, 40.0], abs=1e-2)
    assert psnr(images, images).tolist() == [100.0, 100.0]


def test_clip_score() -> None:
    a, b = torch.tensor([[1.0, 0], [0, 2], [1, 0]]), torch.tensor([[3.0, 0], [1, 1], [-1, 0]])
    assert clip_score(a, b) == pytest.approx((100 + 100 / math.sqrt(2) + 0) / 3)  # opposites count as 0


class Given(torch.nn.Module):
    """A "CLIP" whose pictures are their own embeddings, and whose texts are those given; and its own processor."""

    config = SimpleNamespace()

    def __init__(self, texts: torch.Tensor):
        super().__init__()
        self.texts = texts

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.texts[ids]

    @staticmethod
    def process(images: Any = None, text: Any = None, **_: Any) -> dict[str, torch.Tensor]:
        if images:
            return {"pixel_values": torch.stack(images)}
        return dict.fromkeys(("input_ids", "attention_mask"), torch.arange(len(text)))


def test_clip_score_is_that_of_torchmetrics() -> None:
    images, texts = drawn(12, 1).abs(), drawn(12, 2).abs()  # torchmetrics cuts the mean at 0, the paper each pair's
    given = Given(texts)
    theirs = torchmetrics_clip_score(
        list(images.view(12, 1, 1, -1)), [str(i) for i in range(12)], lambda: (given, given.process)
    )
    assert clip_score(images, texts) == pytest.approx(float(theirs), abs=1e-4)


def test_diversity_is_within_groups() -> None:
    x, groups = drawn(9, 11), list("aabbbbcaa")
    m = x.double().numpy()
    wanted = np.mean([pdist(m[[i for i in range(9) if groups[i] == g]]).mean() for g in "ab"])  # one c is no pair
    assert diversity(x, groups) == (pytest.approx(wanted), 2)
    assert diversity(x, ["same"] * 9)[0] == pytest.approx(pdist(m).mean())
    assert math.isnan(diversity(x, [str(i) for i in range(9)])[0])
