"""The probability-flow ODE to a tolerance: encoding, decoding, and the exact likelihood of what it generates.

With s = log(sigma) for time the flow is dx/ds = x - D(x, sigma) (EDM, arXiv:2206.00364, equation 1), as smooth at one
end as at the other. The model is taken at its word: its pictures are x at sigma_min, where the flow from a Gaussian at
sigma_max arrives. A sampler over `step_grid` walks the same flow for less, but does not say how exactly.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from ldm.denoiser import Denoise, per_picture
from ldm.steps import Noise

PIXEL = 2 / 256  # width of one of 256 levels between -1 and 1

State = tuple[Tensor, ...]  # each [B, ...]
Field = Callable[[State, Tensor], State]  # (state, time [B]) -> its derivative

# Dormand and Prince (1980), RK5(4)7M. The last stage is the solution, and the first stage of the next step; ERROR is
# its difference from the embedded solution of order 4.
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SMALLEST_STEP = 1e-9  # in log(sigma)


@torch.no_grad()
def encode(denoise: Denoise, x: Tensor, sigma_min: float, sigma_max: float, *, tolerance: float = 1e-5) -> Tensor:
    """The code of a picture: x at sigma_max on the flow through x at sigma_min.

    Args:
        denoise: called with sigma [B], since each picture takes its own steps: the same alone and in a batch.
        x: [B, ...], in float32 or float64.
        sigma_min, sigma_max: levels, 0 < sigma_min < sigma_max.
        tolerance: of a step's error, root mean square over a picture, each value measured by 1 + |value|.

    Returns:
        Like x. Divided by `sqrt(sigma_max² + variance of the data)` it is about unit normal.

    Raises:
        ValueError: levels out of order; or a denoiser so rough that no step meets the tolerance.
    """
    return _flow(denoise, x, *_span(sigma_min, sigma_max), tolerance)


@torch.no_grad()
def decode(denoise: Denoise, x: Tensor, sigma_min: float, sigma_max: float, *, tolerance: float = 1e-5) -> Tensor:
    """The picture of a code, x at sigma_min from x at sigma_max: the inverse of `encode`, with its arguments."""
    return _flow(denoise, x, *_span(sigma_min, sigma_max)[::-1], tolerance)


class Likelihood(NamedTuple):
    nats: Tensor  # [B], log-density of x
    code: Tensor  # x at sigma_max


@torch.no_grad()
def log_likelihood(
    denoise: Denoise,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    probes: Tensor | None = None,
    data_mean: Tensor | float = 0.0,
    data_variance: Tensor | float = 1.0,
    tolerance: float = 1e-5,
) -> Likelihood:
    """Log-density of pictures under the flow (Song et al., arXiv:2011.13456, equation 39), in nats for x itself.

    log p(x) at sigma_min = log p(code) at sigma_max + the integral of (dim - trace of dD/dx) over log(sigma).

    At sigma_max the density is N(data_mean, sigma_max² + data_variance). With the defaults that is the papers' N(0, I)
    of x_t on a variance-preserving path; with 0 and 0 EDM's N(0, sigma_max²); with the data's own moments the closest,
    off by O(sigma_max⁻³) where the covariance is diagonal.

    Args:
        denoise, x, sigma_min, sigma_max, tolerance: as in `encode`; the tolerance holds for the log-density as well.
            `denoise` has to be differentiable in x.
        probes: [n, *x.shape] for Hutchinson's estimator of the trace, see `draw_probes`: unbiased, n backward passes an
            evaluation. None takes the exact trace: one for each value of a picture.
        data_mean, data_variance: numbers, or tensors that broadcast with x.

    Raises:
        ValueError: as in `encode`; probes of another shape; a denoiser that has no gradient.
    """
    if probes is not None and (probes.shape[1:] != x.shape or not len(probes)):
        raise ValueError(f"probes should be [n, {', '.join(map(str, x.shape))}], got {list(probes.shape)}")
    values = x[0].numel()

    def field(state: State, time: Tensor) -> State:
        x0, trace = _denoise_and_trace(denoise, state[0], time.exp().to(x), probes)
        return state[0] - x0, values - trace

    code, gained = _solve(field, (x, x.new_zeros(len(x))), *_span(sigma_min, sigma_max), tolerance)
    prior = Normal(torch.as_tensor(data_mean).to(x), torch.as_tensor(data_variance + sigma_max**2).to(x).sqrt())
    return Likelihood(prior.log_prob(code).flatten(1).sum(1) + gained, code)


def draw_probes(x: Tensor, noise: Noise, number: int = 1, kind: str = "rademacher") -> Tensor:
    """Vectors for Hutchinson's estimator: [number, *x.shape], of independent values with mean 0 and variance 1.

    Args:
        noise: `samplers.picture_noise(generators)`, for instance.
        kind: "rademacher", -1 or 1, which has the least variance; or "gaussian".

    Raises:
        ValueError: another kind.
    """
    if kind not in ("rademacher", "gaussian"):
        raise ValueError(f"kind of probes should be rademacher or gaussian, got {kind!r}")
    drawn = torch.stack([noise(x) for _ in range(number)])
    return drawn if kind == "gaussian" else torch.where(drawn < 0, -1.0, 1.0).to(x)


def dequantise(pixels: Tensor, u: Tensor) -> Tensor:
    """Pixels 0 to 255 spread evenly over their level, in [-1, 1): (pixels + u) / 128 - 1, u uniform in [0, 1).

    The mean over u of log(density * width of a level) is a lower bound on the log-probability of the pixels
    (Theis et al., arXiv:1511.01844, section 3.1). Song et al. (arXiv:2011.13456) report bits per dimension so.
    """
    return (pixels.to(u) + u) / 128 - 1


def bits_per_dim(nats: Tensor, values: int, width: float = 1.0) -> Tensor:
    """-log2 of the probability of a level, for each value of a picture.

    Args:
        nats: log-probability or log-density of pictures of `values` values, [B].
        width: of a level in the units of the density: PIXEL for `dequantise`d pixels, where [0, 256] becomes [-1, 1]
            and bits are log2(128) = 7 more than those of the density; 1 for probabilities, as of `elbo` over pixels.
    """
    return -(nats / values + math.log(width)) / math.log(2)


def _flow(denoise: Denoise, x: Tensor, start: float, end: float, tolerance: float) -> Tensor:
    (x,) = _solve(lambda state, time: (state[0] - denoise(state[0], time.exp().to(x)),), (x,), start, end, tolerance)
    return x


def _span(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"the flow runs between 0 < sigma_min < sigma_max, got {sigma_min=} and {sigma_max=}")
    return math.log(sigma_min), math.log(sigma_max)


def _denoise_and_trace(denoise: Denoise, x: Tensor, sigma: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """D at x, and the trace of its Jacobian, [B]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, sigma)
        if not x0.requires_grad:
            raise ValueError(
                "the likelihood needs a denoiser with a gradient in x: is it wrapped in torch.no_grad(), or this call "
                "in torch.inference_mode()?"
            )

        def pulled(weights: Tensor) -> Tensor:  # [B]: weights' (dD/dx) weights
            (product,) = torch.autograd.grad(x0, x, weights, retain_graph=True)
            return (product * weights).flatten(1).sum(1)

        if probes is not None:
            trace = sum(map(pulled, probes), x.new_zeros(())) / len(probes)
        else:
            units = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).view(-1, *x.shape[1:])
            trace = sum((pulled(unit.expand_as(x)) for unit in units), x.new_zeros(()))
    return x0.detach(), trace


def _solve(field: Field, state: State, start: float, end: float, tolerance: float) -> State:
    """The state at `end`. Each picture has its own time and step, so that none depends on its neighbours.

    The whole batch is evaluated until its last picture arrives: its shape, and who is who in it, stay what they were.
    Times are kept in float64 on the CPU, as are decisions: one transfer a step.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance should be above 0, got {tolerance}")
    now = torch.full((len(state[0]),), start, dtype=torch.float64)
    step = torch.full_like(now, math.copysign(0.1, end - start))
    first = field(state, now)
    while bool((now != end).any()):
        last = step.abs() >= (end - now).abs()
        step = torch.where(last, end - now, step)
        slopes = [first]
        for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
            ahead = tuple(y + part for y, part in zip(state, _weighted(weights, slopes, step), strict=True))
            slopes.append(field(ahead, now + node * step))
        errors = [
            (e / (1 + torch.maximum(y.abs(), z.abs()))).square().reshape(len(e), -1).mean(1).sqrt()
            for e, y, z in zip(_weighted(ERROR, slopes, step), state, ahead, strict=True)
        ]
        error = torch.stack(errors).amax(0).cpu().double() / tolerance
        taken = error <= 1  # not where it is nan
        state = _chosen(taken, ahead, state)
        first = _chosen(taken, slopes[-1], first)
        now = torch.where(taken & last, end, torch.where(taken, now + step, now))
        step = step * (0.9 * error**-0.2).nan_to_num(0.0, posinf=5.0).clamp(0.2, 5.0)
        if bool(((now != end) & (step.abs() < SMALLEST_STEP)).any()):
            stuck = float(now[(now != end) & (step.abs() < SMALLEST_STEP)][0].exp())
            raise ValueError(
                f"no step meets the tolerance {tolerance:g} at sigma = {stuck:.4g}: the denoiser gives numbers that "
                "are not finite, or jumps; look at it there, or take a larger tolerance, or float64"
            )
    return state


def _weighted(weights: tuple[float, ...], slopes: list[State], step: Tensor) -> State:
    """step * the weighted sum of slopes, for each part of the state."""
    parts = []
    for part in zip(*slopes, strict=True):
        total = sum(weight * slope for weight, slope in zip(weights, part, strict=True) if weight)
        parts.append(per_picture(step.to(part[0]), part[0]) * total)
    return tuple(parts)


def _chosen(taken: Tensor, new: State, old: State) -> State:
    return tuple(torch.where(per_picture(taken.to(a.device), a), a, b) for a, b in zip(new, old, strict=True))
