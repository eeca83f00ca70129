"""The flow and its likelihood against closed forms of Gaussians and mixtures, and against scipy's solver."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad, solve_ivp
from torch import nn

from ldm.denoiser import Denoiser
from ldm.likelihood import PIXEL, bits_per_dim, decode, dequantise, draw_probes, encode, log_likelihood
from ldm.samplers import picture_noise
from ldm.schedule import VariancePreserving
from tests.sampling import Mixture

LOW, HIGH = 0.01, 80.0


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class Mixture2d:
    """Two Gaussians with diagonal covariances; x [B, 2, 1, 1], sigma [B] or a number. Counts its evaluations."""

    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([[-1.0, 0.5], [0.8, -0.3]], dtype=torch.float64)
    variances = torch.tensor([[0.04, 0.09], [0.16, 0.05]], dtype=torch.float64)

    def __init__(self):
        self.evaluations = 0
        self.mean = self.weights @ self.means
        self.variance = self.weights @ (self.variances + self.means**2) - self.mean**2

    def __call__(self, x, sigma):
        self.evaluations += 1
        y = x.flatten(1)[:, None]
        v = self.variances + torch.as_tensor(sigma, dtype=x.dtype).view(-1, 1, 1) ** 2
        share = torch.softmax(self.weights.log() - ((y - self.means) ** 2 / v + v.log()).sum(-1) / 2, 1)
        return (share[..., None] * (self.means + self.variances / v * (y - self.means))).sum(1).view_as(x)

    def log_density(self, x, sigma):
        """By scipy."""
        parts = [
            math.log(w) + stats.multivariate_normal(m, np.diag(v + sigma**2)).logpdf(x.flatten(1).numpy())
            for w, m, v in zip(self.weights, self.means.numpy(), self.variances.numpy(), strict=True)
        ]
        return torch.from_numpy(np.logaddexp(*parts))

    def moments(self):
        return {"data_mean": self.mean.view(2, 1, 1), "data_variance": self.variance.view(2, 1, 1)}


POINTS = draw(8, 2, 1, 1) * 0.8


# --- The flow ---------------------------------------------------------------------------------------------------------


def test_a_gaussian_is_scaled():
    s, x = 0.6, draw(4, 2, 3, 3)
    denoise = lambda x, sigma: s**2 / (s**2 + sigma.view(-1, 1, 1, 1) ** 2) * x  # noqa: E731
    factor = math.sqrt((s**2 + HIGH**2) / (s**2 + LOW**2))
    torch.testing.assert_close(encode(denoise, x, LOW, HIGH, tolerance=1e-8), factor * x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decode(denoise, factor * x, LOW, HIGH, tolerance=1e-8), x, rtol=1e-6, atol=1e-6)


def test_a_point_keeps_its_quantile():
    data, p = Mixture(), np.array([0.02, 0.4, 0.9])

    def denoise(x, sigma):
        return torch.cat([data.denoise(x[i : i + 1], float(sigma[i])) for i in range(len(x))])

    low, high = data.quantiles(p, LOW), data.quantiles(p, HIGH)
    torch.testing.assert_close(encode(denoise, low, LOW, HIGH, tolerance=1e-7), high, rtol=1e-4, atol=0)
    torch.testing.assert_close(decode(denoise, high, LOW, HIGH, tolerance=1e-7), low, rtol=0, atol=1e-5)


def test_the_solver_is_as_good_as_scipys_on_the_same_equation():
    """There: one Dormand-Prince step for all pictures together; here each has its own."""
    data = Mixture2d()

    def slope(time, y):
        x = torch.from_numpy(y).view(-1, 2, 1, 1)
        return (x - data(x, math.exp(time))).flatten().numpy()

    span, options = (math.log(LOW), math.log(HIGH)), {"method": "RK45"}
    exact = solve_ivp(slope, span, POINTS.flatten().numpy(), rtol=1e-11, atol=1e-11, **options).y[:, -1]
    exact = torch.from_numpy(exact).view_as(POINTS)
    data.evaluations = 0
    theirs = solve_ivp(slope, span, POINTS.flatten().numpy(), rtol=1e-5, atol=1e-5, **options)
    count, data.evaluations = data.evaluations, 0
    error = float((encode(data, POINTS, LOW, HIGH, tolerance=1e-5) - exact).abs().max())
    assert error < 3 * np.abs(theirs.y[:, -1] - exact.flatten().numpy()).max()
    assert data.evaluations < 1.5 * count
    torch.testing.assert_close(encode(data, POINTS, LOW, HIGH, tolerance=1e-11), exact, rtol=1e-9, atol=1e-9)


def test_the_error_follows_the_tolerance_and_decoding_undoes_encoding():
    data, errors, counts = Mixture2d(), [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        data.evaluations = 0
        code = encode(data, POINTS, LOW, HIGH, tolerance=tolerance)
        errors.append(float((decode(data, code, LOW, HIGH, tolerance=tolerance) - POINTS).abs().max()))
        counts.append(data.evaluations)
    assert all(a > 20 * b for a, b in itertools.pairwise(errors)), errors
    assert all(a < b < 4 * a for a, b in itertools.pairwise(counts)), counts


def test_a_picture_is_the_same_alone_and_in_a_batch():
    data = Mixture2d()
    together = log_likelihood(data, POINTS, LOW, HIGH)
    for i in (0, 3, 6):
        alone = log_likelihood(data, POINTS[i : i + 1], LOW, HIGH)
        torch.testing.assert_close(alone.nats[0], together.nats[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alone.code[0], together.code[i], rtol=1e-10, atol=1e-10)


# --- The likelihood ---------------------------------------------------------------------------------------------------


def test_it_is_that_of_a_mixture():
    data = Mixture2d()
    got = log_likelihood(data, POINTS, LOW, HIGH, **data.moments(), tolerance=1e-6)
    exact = data.log_density(POINTS, LOW)
    assert float((got.nats - exact).abs().max()) < 1e-3
    assert float(exact.max() - exact.min()) > 10  # from the middle of a mode to far from any
    torch.testing.assert_close(got.code, encode(data, POINTS, LOW, HIGH, tolerance=1e-6), rtol=1e-4, atol=1e-2)
    # What is left at any tolerance is that two dimensions of this data are correlated: it falls as sigma_max squared.
    left = [
        float((log_likelihood(data, POINTS, LOW, high, **data.moments(), tolerance=1e-7).nats - exact).abs().max())
        for high in (20.0, 80.0)
    ]
    assert left[0] / left[1] == pytest.approx(16, rel=0.1)


def test_the_prior_of_a_variance_preserving_path_is_exact_on_unit_normal_data():
    schedule, x = VariancePreserving.scaled_linear(), 1.5 * draw(3, 1, 2, 2)
    denoise = lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2)  # noqa: E731
    for low, high in ((schedule.sigma_min, schedule.sigma_max), (0.3, 1.0)):
        exact = stats.norm.logpdf(x.numpy(), scale=math.sqrt(1 + low**2)).sum((1, 2, 3))
        got = log_likelihood(denoise, x, low, high, tolerance=1e-8)
        torch.testing.assert_close(got.nats, torch.from_numpy(exact), rtol=1e-7, atol=1e-7)


COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)


def correlated(x, sigma):
    """The denoiser of a Gaussian with correlated dimensions."""
    inverse = torch.linalg.inv(COVARIANCE + sigma.view(-1, 1, 1) ** 2 * torch.eye(2, dtype=x.dtype))
    return (COVARIANCE @ inverse @ x.view(-1, 2, 1)).view_as(x)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinsons_estimator_has_the_mean_and_the_spread_that_theory_says(kind):
    """v'Mv with M the integral of the Jacobian: variance 2 |M|² for normal v; signs have none from the diagonal."""
    number, one = 3000, POINTS[:1]
    exact = log_likelihood(correlated, one, LOW, HIGH).nats
    many = one.expand(number, -1, -1, -1)
    probes = draw_probes(many, lambda x: draw(*x.shape), kind=kind)
    got = log_likelihood(correlated, many, LOW, HIGH, probes=probes).nats
    roots, axes = torch.linalg.eigh(COVARIANCE)
    integral = torch.log((roots / LOW**2 + 1) / (roots / HIGH**2 + 1)) / 2
    square = (axes @ torch.diag(integral) @ axes.T) ** 2
    if kind == "rademacher":
        square = square - torch.diag(square.diagonal())
    std = float((2 * square.sum()).sqrt())
    assert float(got.std()) == pytest.approx(std, rel=0.06)
    assert float((got.mean() - exact).abs()) < 4 * std / math.sqrt(number)


def test_over_every_sign_hutchinsons_estimator_is_the_exact_trace():
    """And one Rademacher probe is exact on its own where the Jacobian is diagonal."""
    x = POINTS[:3]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    probes = signs.view(4, 1, 2, 1, 1).expand(-1, 3, -1, -1, -1)
    exact = log_likelihood(correlated, x, LOW, HIGH)
    torch.testing.assert_close(log_likelihood(correlated, x, LOW, HIGH, probes=probes).nats, exact.nats)
    assert float((log_likelihood(correlated, x, LOW, HIGH, probes=probes[:1]).nats - exact.nats).abs().min()) > 0.1
    diagonal = lambda x, sigma: torch.tanh(x) / (1 + sigma.view(-1, 1, 1, 1))  # noqa: E731
    exact = log_likelihood(diagonal, x, LOW, HIGH)
    torch.testing.assert_close(log_likelihood(diagonal, x, LOW, HIGH, probes=probes[:1]).nats, exact.nats)


def test_probes_have_mean_0_and_variance_1_and_belong_to_their_picture():
    x = torch.empty(2, 3, 20, 20)
    for kind in ("rademacher", "gaussian"):
        probes = draw_probes(x, picture_noise(generators(1, 2)), 5, kind)
        assert probes.shape == (5, 2, 3, 20, 20)
        assert probes.dtype == x.dtype
        assert abs(float(probes.mean())) < 0.05
        assert float(probes.var()) == pytest.approx(1, abs=0.05)
        assert torch.equal(draw_probes(x[1:], picture_noise(generators(2)), 5, kind)[:, 0], probes[:, 1])
        assert set(probes.unique().tolist()) == {-1.0, 1.0} or kind == "gaussian"


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        with torch.no_grad():
            self.conv.weight.copy_(draw(1, 1, 3, 3, seed=5) / 4)
            self.conv.bias.fill_(0.1)

    def forward(self, sample, timestep, shift):
        return torch.sin(self.conv(sample)) + shift + timestep.view(-1, 1, 1, 1).to(sample.dtype) / 1000


def test_a_network_in_single_precision_is_that_in_double():
    """Through `Denoiser` on a beta table, with a context for each picture."""
    schedule, x = VariancePreserving.scaled_linear(), draw(3, 1, 3, 3)
    nats = []
    for dtype in (torch.float64, torch.float32):
        denoiser = Denoiser(Network().to(dtype), schedule, "v")
        context = {"shift": draw(3, 1, 1, 1, seed=6).to(dtype)}
        denoise = lambda x, sigma, d=denoiser, c=context: d(x, sigma, c)  # noqa: E731
        result = log_likelihood(denoise, x.to(dtype), schedule.sigma_min, schedule.sigma_max)
        assert result.nats.dtype == result.code.dtype == dtype
        assert not result.nats.requires_grad
        assert all(parameter.grad is None for parameter in denoiser.parameters())
        nats.append(result.nats.double())
    torch.testing.assert_close(nats[1], nats[0], rtol=1e-3, atol=1e-3)


# --- Bits -------------------------------------------------------------------------------------------------------------


def test_bits_of_what_is_uniform_are_8():
    values = 12
    density = torch.full((3,), values * math.log(1 / 2))  # over [-1, 1)
    torch.testing.assert_close(bits_per_dim(density, values, PIXEL), torch.full((3,), 8.0))
    torch.testing.assert_close(bits_per_dim(torch.tensor([values * math.log(1 / 256)]), values), torch.tensor([8.0]))


def test_dequantised_pixels_fill_their_level():
    pixels = torch.arange(256, dtype=torch.uint8)
    u = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0))
    x = dequantise(pixels, u)
    assert float(x.min()) >= -1
    assert float(x.max()) < 1
    assert torch.equal(((x + 1) * 128).floor(), pixels.float().expand(1000, -1))
    torch.testing.assert_close(x[:, 1:].amin(0) - x[:, :-1].amin(0), torch.full((255,), PIXEL), rtol=1e-4, atol=0)


def test_bits_of_dequantised_pixels_bound_those_of_the_pixels():
    u = ((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000).view(-1, 1)
    for std, gap in ((0.004, 0.02), (0.3, 1e-4)):
        pixel = torch.tensor([130.0], dtype=torch.float64)
        x = dequantise(pixel, u)
        bits = bits_per_dim(torch.from_numpy(stats.norm.logpdf(x.numpy(), scale=std)).squeeze(1), 1, PIXEL).mean()
        mass = quad(lambda y, std=std: stats.norm.pdf(y, scale=std), 130 / 128 - 1, 131 / 128 - 1)[0]
        assert -math.log2(mass) < float(bits)
        assert (float(bits) + math.log2(mass) < gap) == (std == 0.3)


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_bad_calls_say_what_was_got():
    data = Mixture2d()
    for low, high in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
            encode(data, POINTS, low, high)
    with pytest.raises(ValueError, match="tolerance should be above 0"):
        encode(data, POINTS, LOW, HIGH, tolerance=0.0)
    with pytest.raises(ValueError, match=r"probes should be \[n, 8, 2, 1, 1\], got \[8, 2, 1, 1\]"):
        log_likelihood(data, POINTS, LOW, HIGH, probes=POINTS)
    with pytest.raises(ValueError, match="rademacher or gaussian, got 'sparse'"):
        draw_probes(POINTS, torch.randn_like, kind="sparse")
    with pytest.raises(ValueError, match=r"wrapped in torch.no_grad"):
        log_likelihood(torch.no_grad()(data), POINTS, LOW, HIGH)


def test_a_denoiser_that_no_step_can_follow_is_named():
    data = Mixture2d()

    def broken(x, sigma):
        return data(x, sigma) / (sigma < 2).to(x).view(-1, 1, 1, 1)

    with pytest.raises(ValueError, match=r"no step meets the tolerance 1e-05 at sigma = (1\.9|2)"):
        encode(broken, POINTS, LOW, HIGH)
