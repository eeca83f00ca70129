"""The variational bound on log p(x_0), in nats a picture: diffusion as a hierarchical VAE whose encoder is fixed.

Two forms of one mean, that of log p(x_0, ..., x_T) / q(x_1, ..., x_T | x_0) under q, over a beta table of T rows:
`elbo`, whose terms are divergences from q(x_s | x_t, x_0), and `consistency_elbo`, whose terms compare p(x_s | x_t)
with q(x_s | x_r); r, s, t are neighbours. All in x = x_0 + sigma * eps: scaling x changes no divergence and no ratio
of densities. `likelihood.bits_per_dim` turns nats into bits. Call these under `torch.no_grad()` to evaluate.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.denoiser import Denoise, widened
from ldm.forward import large_variance, marginal, posterior, transition
from ldm.samplers import LogVariance
from ldm.schedule import NoiseSchedule, VariancePreserving
from ldm.steps import Noise

ReverseStep = Callable[[Tensor, float, float], Normal]  # (x, sigma, lower) -> p(x at the lower level | x at sigma)
LogLikelihood = Callable[[Tensor, Normal], Tensor]  # (x_0, p(x_0 | x_1)) -> nats [B]


class Bound(NamedTuple):
    """The three terms, each [B], in nats."""

    reconstruction: Tensor  # log p(x_0 | x_1)
    prior: Tensor  # divergence at the last row, which nothing learns
    denoising: Tensor  # the sum over the rows between

    @property
    def total(self) -> Tensor:
        """The lower bound on log p(x_0): [B]."""
        return self.reconstruction - self.prior - self.denoising


def ancestral_step(denoise: Denoise, variance: str | LogVariance = "small") -> ReverseStep:
    """p(x_s | x_t) of DDPM's ancestral sampling (arXiv:2006.11239, sections 3.2 and 3.3).

    Args:
        variance: as of `samplers.ddpm`: "small", the posterior's beta-tilde; "large", beta; or a learned one between
            the two. To x_0 the small one would be 0: there it is, and so is the learned one, sigma² of the first row,
            as in `loss.DiscreteELBO`.

    Raises:
        ValueError: another variance.
    """
    if not callable(variance) and variance not in ("small", "large"):
        raise ValueError(f"variance of ddpm should be small or large, or a function; got {variance!r}")

    def step(x: Tensor, sigma: float, lower: float) -> Normal:
        small, large = posterior(x, denoise(x, sigma), sigma, lower), large_variance(sigma, lower) ** 0.5
        if variance == "large":
            return Normal(small.mean, large, validate_args=False)
        if lower == 0:
            return Normal(small.mean, sigma, validate_args=False)
        if callable(variance):
            std = small.stddev * (large / small.stddev) ** variance(x, sigma)
            return Normal(small.mean, std, validate_args=False)
        return small

    return step


def elbo(
    step: ReverseStep,
    x0: Tensor,
    schedule: NoiseSchedule,
    noise: Noise,
    *,
    log_likelihood: LogLikelihood | None = None,
    rows: Sequence[int] | Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> Bound:
    """Reconstruction, prior matching and denoising matching (arXiv:2006.11239, equation 5), a draw of each.

        E log p(x_0 | x_1) - KL(q(x_T | x_0) || p(x_T)) - sum of E KL(q(x_s | x_t, x_0) || p(x_s | x_t))

    Args:
        step: the model, see `ancestral_step`. It is asked once for each row. p(x_T) is N(0, I) in the papers' x_T.
        x0: [B, ...].
        schedule: a beta table, of T rows.
        noise: drawn once for each row. The prior term needs none, it is exact.
        log_likelihood: of x_0 under p(x_0 | x_1): `pixel_log_likelihood` for pictures of 8 bits, the default; or
            `gaussian_log_likelihood`, a density.
        rows: of the denoising term, which of 1 to T - 1 to ask; drawn evenly, the result is an unbiased estimate of
            the sum. None asks all.
        weights: how many rows each of these stands for, 1 over its chance to be drawn; by default all for as many.

    Raises:
        ValueError: a schedule that is not a beta table, rows that it does not have or whose weights are not as many,
            or pictures not of 8 bits.
    """
    x0, sigmas = widened(x0), _levels(schedule)
    reconstruction = _reconstruction(step, x0, sigmas[0], noise, log_likelihood or pixel_log_likelihood)
    prior = _sum(kl_divergence(marginal(x0, sigmas[-1]), _prior(x0, sigmas[-1])))

    def matching(row: int) -> Tensor:
        sigma, lower = sigmas[row], sigmas[row - 1]
        x = _draw(marginal(x0, sigma), noise)
        return _sum(kl_divergence(posterior(x, x0, sigma, lower), step(x, sigma, lower)))

    return Bound(reconstruction, prior, _over_rows(matching, rows, weights, len(sigmas)))


def consistency_elbo(
    step: ReverseStep,
    x0: Tensor,
    schedule: NoiseSchedule,
    noise: Noise,
    *,
    log_likelihood: LogLikelihood | None = None,
    rows: Sequence[int] | Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> Bound:
    """The same bound, each x_s compared with both neighbours (Luo, arXiv:2208.11970, equation 45); a draw of each term.

        E log p(x_0 | x_1) - E KL(q(x_T | x_S) || p(x_T)) - sum of E log(q(x_s | x_r) / p(x_s | x_t))

    S the row before T. There the last term is written as a divergence, which it is not: given x_r and x_t, x_s is not
    distributed as q(x_s | x_r). Three draws a row go into it, where `elbo` takes the mean over x_s in closed form, so
    it varies more. (Along one whole chain the sum would be log p / q itself, which varies little where p is nearly
    exact; here rows are drawn on their own, so that any of them will do.)

    Arguments, result and errors: as of `elbo`; `noise` is drawn three times a row.
    """
    x0, sigmas = widened(x0), [0.0, *_levels(schedule)]  # x_0 is a level of its own here: of each row, one more
    reconstruction = _reconstruction(step, x0, sigmas[1], noise, log_likelihood or pixel_log_likelihood)
    before_last = _draw(marginal(x0, sigmas[-2]), noise)
    prior = _sum(kl_divergence(transition(before_last, sigmas[-2], sigmas[-1]), _prior(x0, sigmas[-1])))

    def consistency(row: int) -> Tensor:
        lowest, lower, sigma = sigmas[row - 1 : row + 2]
        up = transition(_draw(marginal(x0, lowest), noise), lowest, lower)
        middle = _draw(up, noise)
        down = step(_draw(transition(middle, lower, sigma), noise), sigma, lower)
        return _sum(up.log_prob(middle) - down.log_prob(middle))

    return Bound(reconstruction, prior, _over_rows(consistency, rows, weights, len(sigmas) - 1))


class Posterior(Protocol):
    """q(z | picture), as `Autoencoder.encode` returns it: elementwise normal, [B, ...]."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def logvar(self) -> Tensor: ...


def latent_elbo(reconstruction: Tensor, prior: Tensor, posterior: Posterior) -> Tensor:
    """The VAE's own bound around a model of its latents: E log p(picture | z) + E log p(z) + entropy of q(z | picture).

    Args:
        reconstruction: log p(picture | z) at z drawn from the posterior, [B] in nats: `pixel_log_likelihood` of the
            picture under a Normal around `Autoencoder.decode(z)`.
        prior: log p(z) at the same z, [B]: the total of `elbo` with `gaussian_log_likelihood`, or the nats of
            `likelihood.log_likelihood`. With log N(z; 0, I) this is the plain VAE's bound (arXiv:1312.6114, eq. 3).
        posterior: in the units of z.

    Raises:
        ValueError: a posterior without variance, whose entropy is minus infinity.
    """
    if bool(posterior.logvar.isneginf().any()):
        raise ValueError("this encoder is deterministic: its latents have no density, so there is no bound to speak of")
    return reconstruction + prior + _sum(posterior.logvar + math.log(2 * math.pi) + 1) / 2


def gaussian_log_likelihood(x0: Tensor, normal: Normal) -> Tensor:
    """Log-density of x_0: [B] in nats."""
    return _sum(normal.log_prob(x0))


def pixel_log_likelihood(x0: Tensor, normal: Normal) -> Tensor:
    """Log-probability of pixels of 8 bits, k / 127.5 - 1, whose level is from x - 1/255 to x + 1/255, without end for 0
    and 255 (DDPM, arXiv:2006.11239, equation 13): [B] in nats.

    Raises:
        ValueError: values that are no such pixels.
    """
    pixel = (x0 + 1) * 127.5
    off = float((pixel - pixel.round().clamp(0, 255)).abs().max())
    if off > 0.01:
        raise ValueError(
            f"pixels of 8 bits should be k / 127.5 - 1, k from 0 to 255; got values off by {off:.3g} of a level: for "
            "anything else take log_likelihood=gaussian_log_likelihood"
        )
    low, high = ((x0 + half - normal.mean) / normal.stddev for half in (-1 / 255, 1 / 255))
    # Without end is 40 standard deviations further: nothing is left there, and infinity would have no gradient.
    low = torch.where(pixel < 0.5, high.clamp(max=0) - 40, low)
    high = torch.where(pixel > 254.5, low.clamp(min=0) + 40, high)
    # log(Phi(high) - Phi(low)) in whichever tail Phi is small, where logarithms keep their digits.
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    log_high = torch.special.log_ndtr(high)
    return _sum(log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high)))


def _reconstruction(step: ReverseStep, x0: Tensor, sigma: float, noise: Noise, log_likelihood: LogLikelihood) -> Tensor:
    return log_likelihood(x0, step(_draw(marginal(x0, sigma), noise), sigma, 0.0))


def _prior(x0: Tensor, sigma: float) -> Normal:
    """p(x_T): N(0, I) of alpha * x."""
    return Normal(torch.zeros_like(x0), math.sqrt(1 + sigma**2), validate_args=False)


def _over_rows(
    term: Callable[[int], Tensor],
    rows: Sequence[int] | Tensor | None,
    weights: Sequence[float] | None,
    entries: int,
) -> Tensor:
    """The sum of a term over rows 1 to entries - 1, or its estimate from some of them."""
    chosen = list(range(1, entries)) if rows is None else [int(row) for row in rows]
    if not chosen or not all(1 <= row < entries for row in chosen):
        raise ValueError(f"rows should be some of 1 to {entries - 1}; got {chosen}")
    weights = [(entries - 1) / len(chosen)] * len(chosen) if weights is None else weights
    if len(weights) != len(chosen):
        raise ValueError(f"weights should have a number for each of {len(chosen)} rows; got {len(weights)}")
    total = weights[0] * term(chosen[0])
    for weight, row in zip(weights[1:], chosen[1:], strict=True):
        total = total + weight * term(row)
    return total


def _levels(schedule: NoiseSchedule) -> list[float]:
    if not isinstance(schedule, VariancePreserving):
        raise ValueError(f"the bound is a sum over the rows of a beta table; got {type(schedule).__name__}")
    return schedule.table.tolist()


def _draw(normal: Normal, noise: Noise) -> Tensor:
    return normal.mean + normal.stddev * noise(normal.mean)


def _sum(terms: Tensor) -> Tensor:
    return terms.flatten(1).sum(1)
