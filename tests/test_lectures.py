"""The lectures' formulas that no other test holds as they are written there, and docs/lectures.md, the page of all.

In the lectures' symbols: a_t = 1 - beta_t, bar is the product of the a's, and x_t = sqrt(bar) x, x = x_0 + sigma eps.
"""

import ast
import itertools
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import Normal, kl_divergence

from ldm.denoiser import Denoiser, epsilon_from, sample_from_epsilon, score_from
from ldm.elbo import ancestral_step, elbo, gaussian_log_likelihood, latent_elbo
from ldm.forward import in_paper_units, marginal, posterior, transition
from ldm.guidance import classifier_free
from ldm.likelihood import encode
from ldm.loss import DiscreteELBO, Plain, UniformTime, denoising_loss
from ldm.samplers import ddim, ddpm, euler
from ldm.schedule import EDM, VariancePreserving
from tests.sampling import moments
from vae.autoencoder import Posterior

ROOT = Path(__file__).resolve().parents[1]
T = 20
VP = VariancePreserving(torch.linspace(0.01, 0.4, T, dtype=torch.float64))
A, BARS = 1 - VP.betas, torch.cumprod(1 - VP.betas, 0)
SIGMAS = VP.table.tolist()
close = torch.testing.assert_close


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Network(nn.Module):
    """An epsilon network; keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, sample, timestep):
        self.seen = sample, timestep
        return torch.sin(2 * sample * self.weight) + timestep.view(-1, 1, 1, 1) / T


# --- DDPM: 000, 001, 003 ----------------------------------------------------------------------------------------------


def test_training_is_the_papers_algorithm_1():
    """norm(eps - eps_theta(sqrt(bar_t) x_0 + sqrt(1 - bar_t) eps, t))², t drawn evenly from all rows."""
    x0, eps, network = draw(T, 1, 2, 2), draw(T, 1, 2, 2, seed=1), Network()
    sigma = UniformTime(VP).sigma((torch.arange(T) + 0.5) / T)
    denoiser = Denoiser(network, VP, "epsilon")
    loss = denoising_loss(denoiser, x0, None, sigma.double(), eps, Plain(denoiser))
    bar, t = BARS.view(-1, 1, 1, 1), torch.arange(T, dtype=torch.float64)
    expected = (eps - network(bar.sqrt() * x0 + (1 - bar).sqrt() * eps, t)) ** 2
    close(loss, expected.mean((1, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("t", [1, 7, T - 1])
def test_an_ancestral_step_is_the_papers_algorithm_2(t, variance):
    """x_{t-1} = (x_t - (1 - a_t) / sqrt(1 - bar_t) eps_theta(x_t, t)) / sqrt(a_t) + sigma_t z."""
    x_t, z, network = draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1), Network()
    got = ddpm(
        Denoiser(network, VP, "epsilon"),
        x_t / BARS[t].sqrt(),
        SIGMAS[t - 1 : t + 1][::-1],
        variance=variance,
        noise=lambda x: z,
    )
    of_one_step = 1 - A[t]
    added = of_one_step if variance == "large" else of_one_step * (1 - BARS[t - 1]) / (1 - BARS[t])
    eps = network(x_t, torch.full((3,), t, dtype=torch.float64))
    expected = (x_t - of_one_step / (1 - BARS[t]).sqrt() * eps) / A[t].sqrt() + added.sqrt() * z
    close(BARS[t - 1].sqrt() * got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [1, 7, T - 1])
def test_one_divergence_has_the_four_forms_of_the_lecture(t):
    """KL(q(x_{t-1} given x_t, x_0) to p) over means, clean pictures, noises and scores (003), and the ELBO's weight."""
    a_t, bar, before = A[t], BARS[t], BARS[t - 1]
    x0, eps, guess = draw(5, 1, 1, 1), draw(5, 1, 1, 1, seed=1), draw(5, 1, 1, 1, seed=2)
    sigma, lower = (((1 - b) / b).sqrt() for b in (bar, before))
    x = x0 + sigma * eps
    true, model = (in_paper_units(posterior(x, y, sigma, lower), before.sqrt()) for y in (x0, guess))
    variance = (1 - a_t) * (1 - before) / (1 - bar)
    divergence = kl_divergence(true, model)
    close(divergence, (true.mean - model.mean) ** 2 / (2 * variance))
    close(divergence, before * (1 - a_t) ** 2 / (1 - bar) ** 2 * (guess - x0) ** 2 / (2 * variance))
    noise = epsilon_from(x, guess, sigma)
    close(sample_from_epsilon(x, eps, sigma), (bar.sqrt() * x - (1 - bar).sqrt() * eps) / bar.sqrt())
    close(divergence, (1 - a_t) ** 2 / ((1 - bar) * a_t) * (eps - noise) ** 2 / (2 * variance))
    score, of_model = (score_from(x, y, sigma) / bar.sqrt() for y in (x0, guess))
    close(score, -eps / (1 - bar).sqrt())
    close(divergence, (1 - a_t) ** 2 / a_t * (score - of_model) ** 2 / (2 * variance))
    weight = DiscreteELBO(VP)(VP.table[t : t + 1])
    close(divergence, weight * (x0 - guess) ** 2, rtol=1e-5, atol=0)


# --- Scores: 002, 003 -------------------------------------------------------------------------------------------------


def test_denoising_score_matching_is_score_matching_and_a_constant():
    """-eps / sigma is the score of x given x_0; that of x is its mean over the x_0 which x may come from (003)."""
    points, shares, sigma = torch.tensor([-1.0, 0.4, 1.5]).double(), torch.tensor([0.2, 0.5, 0.3]).double(), 0.6
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    joint = shares[:, None] * Normal(points[:, None], sigma).log_prob(grid).exp()  # of x_0 and x
    density = joint.sum(0)
    (score,) = torch.autograd.grad(density.log().sum(), grid)
    of_pairs = (points[:, None] - grid) / sigma**2  # -eps / sigma
    close((joint / density * of_pairs).sum(0), score)
    estimate = (joint / density * points[:, None]).sum(0)  # E[x_0 given x]
    close(score_from(grid, estimate, sigma), score)
    width = float((grid[1] - grid[0]).detach())
    gaps = []
    for guess in (score, torch.zeros_like(grid), torch.sin(grid) - grid):
        denoising = (joint * (guess - of_pairs) ** 2).sum() * width
        explicit = (density * (guess - score) ** 2).sum() * width
        gaps.append(float((denoising - explicit).detach()))
    assert gaps == pytest.approx([gaps[0]] * 3, rel=1e-9)
    assert gaps[0] > 0.5  # so the slide's equality does not hold draw by draw


# --- Bounds: 001, 003 -------------------------------------------------------------------------------------------------


SHORT = VariancePreserving(torch.linspace(0.02, 0.3, 5, dtype=torch.float64))  # so that its prior term counts


def chain(x0, step, noise, table):
    """log p(x_0, ..., x_T) - log q(x_1, ..., x_T given x_0) along a whole chain, each [B]."""
    x, sigmas, total = x0, [0.0, *table.table.tolist()], torch.zeros(len(x0), dtype=torch.float64)
    for lower, sigma in itertools.pairwise(sigmas):
        forward = transition(x, lower, sigma)
        higher = forward.mean + forward.stddev * noise(x)
        total = total + (step(higher, sigma, lower).log_prob(x) - forward.log_prob(higher)).flatten(1).sum(1)
        x = higher
    prior = Normal(torch.zeros_like(x), math.sqrt(1 + sigmas[-1] ** 2))
    return total + prior.log_prob(x).flatten(1).sum(1)


def test_where_p_is_the_true_reverse_every_chain_has_the_likelihood():
    """p(x_0, ..., x_T) / q(x_1, ..., x_T given x_0) = p(x_0): nothing is lost, on any chain."""
    x0, generator = draw(50, 2), torch.Generator().manual_seed(1)
    noise = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    got = chain(x0, ancestral_step(lambda x, sigma: x / (1 + sigma**2), "large"), noise, VP)
    close(got, torch.from_numpy(stats.norm.logpdf(x0.numpy()).sum(1)), rtol=1e-9, atol=1e-9)


def test_the_three_terms_are_the_mean_over_whole_chains():
    x0, generator = torch.full((20_000, 1), 0.4, dtype=torch.float64), torch.Generator().manual_seed(1)
    noise = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    step = ancestral_step(lambda x, sigma: 0.3 + 0.25 / (0.25 + sigma**2) * (x - 0.3), "large")
    along = chain(x0, step, noise, SHORT)
    terms = elbo(step, x0, SHORT, noise, log_likelihood=gaussian_log_likelihood).total
    error = math.sqrt((float(along.var()) + float(terms.var())) / len(x0))
    assert abs(float(along.mean() - terms.mean())) < 4.5 * error
    assert error < 0.02


@pytest.mark.parametrize(("mean", "std"), [(0.2, 0.3), (0.9, 0.1), (0.503, 0.186)])
def test_the_bound_misses_by_the_divergence_of_the_posterior(mean, std):
    """log p(x) = bound + KL(q(z given x) to p(z given x)), for z ~ N(0.3, 0.5²), x = 2 z + 0.4 eps and any normal q."""
    x, slope, spread, of_z = 1.1, 2.0, 0.4, Normal(torch.tensor(0.3).double(), 0.5)
    precision = 1 / 0.5**2 + slope**2 / spread**2
    true = Normal((0.3 / 0.5**2 + slope * x / spread**2) / precision, torch.tensor(precision).double() ** -0.5)
    q = Normal(torch.tensor([[mean]]).double(), torch.tensor([[std]]).double())
    # Means over q of the two log-densities, quadratic in z: at the mean of q, and half their curvature times std².
    reconstruction = Normal(slope * q.mean, spread).log_prob(torch.tensor(x).double()) - (slope * std / spread) ** 2 / 2
    prior = of_z.log_prob(q.mean) - (std / 0.5) ** 2 / 2
    bound = latent_elbo(reconstruction[:, 0], prior[:, 0], Posterior(q.mean, 2 * q.stddev.log()))
    exact = stats.norm.logpdf(x, slope * 0.3, math.hypot(slope * 0.5, spread))
    close(bound, exact - kl_divergence(q, true)[:, 0])
    assert float(bound) < exact


# --- Guidance: 003, 004 -----------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Predicts x_0 of N(0, 1) data (label 0), or of the part N(1.5, 0.2) (label 1)."""

    means, variances = torch.tensor([0.0, 1.5]).double(), torch.tensor([1.0, 0.2]).double()

    def forward(self, sample, timestep, class_labels):
        sigma = timestep.mul(4).exp()  # EDM's clock
        x = sample * (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
        mean, v = self.means[class_labels], self.variances[class_labels]
        return mean.view(-1, 1, 1, 1) + (v / (v + sigma**2)).view(-1, 1, 1, 1) * (x - mean.view(-1, 1, 1, 1))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_a_guided_score_is_the_gradient_of_a_tilted_density(scale):
    """Of p(x given y)^scale p(x)^(1 - scale): not of p(x given y), as both guidance slides write, unless scale is 1.

    Nor are the tilted densities of two levels those of one density under noise: the variance that they say data has
    would be the same at all levels.
    """
    denoiser = Denoiser(Parts(), EDM(1.0), "sample")
    part, all_data = ({"class_labels": torch.full((40,), k)} for k in (1, 0))
    guided, x, said = classifier_free(denoiser, part, all_data, scale), 2 * draw(40, 1, 1, 1), []
    for sigma in (0.5, 2.0):
        unconditional, conditional = (
            Normal(mean, (v + sigma**2) ** 0.5) for mean, v in zip(Parts.means, Parts.variances, strict=True)
        )
        place = x.clone().requires_grad_()
        tilted = scale * conditional.log_prob(place) + (1 - scale) * unconditional.log_prob(place)
        (gradient,) = torch.autograd.grad(tilted.sum(), place)
        score = score_from(x, guided(x, sigma), sigma)
        close(score, gradient)
        place = x.clone().requires_grad_()
        (of_conditional,) = torch.autograd.grad(conditional.log_prob(place).sum(), place)
        assert torch.allclose(score, of_conditional) == (scale == 1)
        share = (guided(x + 1, sigma) - guided(x, sigma)).mean()  # v / (v + sigma²)
        said.append(float(sigma**2 * share / (1 - share)))
    assert (said[0] == pytest.approx(said[1])) == (scale != 3)


# --- DDIM and its equation: 003 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("t", "s"), [(7, 6), (T - 1, 3)])
def test_a_ddim_step_is_the_slides_with_the_product_for_alpha(t, s, eta):
    """The slide's alpha is the DDIM paper's: 003 elsewhere writes alpha-bar for it."""
    network, x_t, z = Network(), draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1)
    sigma_t = eta * ((1 - BARS[s]) / (1 - BARS[t]) * (1 - BARS[t] / BARS[s])).sqrt()

    def slide(alpha_t, alpha_s):
        eps = network(x_t, torch.full((3,), t, dtype=torch.float64))
        predicted = (x_t - (1 - alpha_t).sqrt() * eps) / alpha_t.sqrt()
        return alpha_s.sqrt() * predicted + (1 - alpha_s - sigma_t**2).clamp(min=0).sqrt() * eps + sigma_t * z

    denoiser = Denoiser(network, VP, "epsilon")
    got = ddim(denoiser, x_t / BARS[t].sqrt(), [SIGMAS[t], SIGMAS[s]], eta=eta, noise=lambda x: z) * BARS[s].sqrt()
    close(got, slide(BARS[t], BARS[s]), rtol=1e-6, atol=1e-6)
    assert float((got - slide(A[t], A[s])).detach().abs().max()) > 0.05


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_non_markovian_processes_have_the_same_marginals(eta):
    """q_sigma(x_{t-1} given x_t, x_0) leads from q(x_t given x_0) to q(x_{t-1} given x_0): any eta, over any rows."""
    x0, sigmas = 0.7, [SIGMAS[row] for row in (19, 12, 11, 3, 0)]
    mean, variance = moments(ddim, lambda x, sigma: torch.full_like(x, x0), sigmas, SIGMAS[-1] ** 2, eta=eta)
    wanted = marginal(torch.tensor(x0).double(), SIGMAS[0])
    # The run starts at 0, not at x_0, and of that eta leaves something.
    left = math.prod(math.sqrt(1 - eta**2 * (1 - (b / a) ** 2)) * b / a for a, b in itertools.pairwise(sigmas))
    assert mean == pytest.approx(x0 * (1 - left))
    assert variance == pytest.approx(float(wanted.variance), rel=1e-9)


def test_the_slope_of_the_flow_is_the_network_at_x_t():
    """d xbar / d sigma = eps_theta(xbar / sqrt(sigma² + 1), t) with xbar = x_t / sqrt(bar_t) (003)."""
    network, xbar, t = Network(), 3 * draw(4, 1, 2, 2), 7
    sigma = ((1 - BARS[t]) / BARS[t]).sqrt()
    slope = epsilon_from(xbar, Denoiser(network, VP, "epsilon")(xbar, sigma), sigma)
    sample, clock = network.seen
    close(sample, xbar / (sigma**2 + 1).sqrt())
    close(sample, BARS[t].sqrt() * xbar)
    close(clock, torch.full((4,), 7.0).double(), rtol=1e-5, atol=1e-5)
    close(slope, network(sample, clock))


# --- EDM: 004 ---------------------------------------------------------------------------------------------------------


def test_the_probability_flow_is_the_lectures_in_any_clock():
    """dx = -sigma'(t) sigma(t) score dt: here on data N(0, s²), whose flow is known, by the clock sigma(t) = t²."""
    s, t = 0.6, torch.linspace(0.3, 5.0, 30, dtype=torch.float64)
    sigma, rate = t**2, 2 * t
    x = (s**2 + sigma**2).sqrt()  # where the flow carries a point, but for a factor
    x_rate = torch.func.vmap(torch.func.grad(lambda t: (s**2 + t**4).sqrt()))(t)
    denoised = s**2 / (s**2 + sigma**2) * x
    close(x_rate, -rate * sigma * score_from(x, denoised, sigma))
    denoise = lambda x, sigma: s**2 / (s**2 + torch.as_tensor(sigma).view(-1, 1) ** 2) * x  # noqa: E731
    there = encode(denoise, x[:1, None], float(sigma[0]), float(sigma[-1]))
    close(there.flatten(), x[-1:], rtol=1e-4, atol=0)


def test_the_slope_points_to_the_denoised_picture():
    """slope = -(D - x) / sigma; D = x - t slope: the tangent at t ends there at 0."""
    network, x, sigma = Network(), draw(3, 1, 2, 2), 1.7
    denoise = Denoiser(network, EDM(1.0), "epsilon")
    slope = epsilon_from(x, denoise(x, sigma), sigma)
    close(slope, -sigma * score_from(x, denoise(x, sigma), sigma))
    close(denoise(x, sigma), x - sigma * slope)
    close(euler(denoise, x, [sigma, 0.0]), x - sigma * slope)


@pytest.mark.parametrize("d", [0.5, 1.0])
def test_edms_network_is_asked_for_numbers_of_one_size(d):
    """Input and target have unit variance at every level; the target goes from the negative noise to the picture."""
    schedule = EDM(d)
    denoiser = Denoiser(Network(), schedule, "edm", d)
    sigma = torch.logspace(-4, 4, 33, dtype=torch.float64)
    one, none = torch.ones(33, 1).double(), torch.zeros(33, 1).double()
    of_x0 = denoiser.network_target(d * one, none, sigma)  # the target is linear: its responses to either
    of_eps = denoiser.network_target(none, one, sigma)
    close(of_x0**2 + of_eps**2, one)
    close(schedule.alpha(sigma) ** 2 * (d**2 + sigma**2), one[:, 0])
    close(torch.stack([of_x0[0], of_eps[0], of_x0[-1], of_eps[-1]]), torch.tensor([[0.0], [-1], [1], [0]]).double(),
          rtol=0, atol=1e-3)  # fmt: skip


# --- The page ---------------------------------------------------------------------------------------------------------


PAGE = ROOT / "docs" / "lectures.md"
NAME = re.compile(r"`([\w/]+\.py)(?:::([\w.]+))?`")


@cache
def names_of(file):
    """Functions, classes, methods as Class.method, and constants of a file."""
    found = set()
    for node in ast.parse((ROOT / file).read_text("utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def rows():
    """(formula, code, proof) of every line of the page's tables of formulas."""
    for section in PAGE.read_text("utf-8").split("\n| formula | code | proof |\n")[1:]:
        for line in section.splitlines()[1:]:
            if not line.startswith("|"):
                break
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_what_the_page_names_exists():
    named = NAME.findall(PAGE.read_text("utf-8"))
    assert len(named) > 100
    for file, name in named:
        assert (ROOT / file).is_file(), f"docs/lectures.md names {file}, which does not exist"
        assert not name or name in names_of(file), f"docs/lectures.md names {file}::{name}, which does not exist"


def test_every_formula_has_code_and_a_proof_or_says_why_not():
    listed = list(rows())
    assert len(listed) > 60
    for row in listed:
        assert len(row) == 3, row
        formula, code, proof = row
        assert formula
        if not code.startswith("not code:"):
            assert NAME.search(code), f"no code: {row}"
            proofs = [file for file, name in NAME.findall(proof) if name.startswith("test_")]
            assert proofs, f"no proof: {row}"
            assert all(file.startswith("tests/") for file in proofs)
