"""The training loss: how noise levels are drawn, how they are weighted, and the square error of x_0 under both.

A distribution of levels is its quantile function, from uniform numbers u to sigma, so that a draw is a pure function of
the numbers it is given. A weight is a function of sigma on the square error of x_0. docs/equations.md has both tables.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.denoiser import Context, Denoiser, noised, per_picture, row_before, widened
from ldm.schedule import EDM, NoiseSchedule, RectifiedFlow, VariancePreserving

Weight = Callable[[Tensor], Tensor]  # sigma [B] -> weight [B] on the square error of x_0


@dataclass(frozen=True)
class UniformTime:
    """Time drawn evenly: a row of the beta table (DDPM, arXiv:2006.11239, algorithm 1); t between 0 and 1 on the flow
    (arXiv:2209.03003); log(sigma) between the two ends of EDM."""

    schedule: NoiseSchedule

    def sigma(self, u: Tensor) -> Tensor:
        """Noise level at uniform numbers u inside (0, 1); of u's shape, float32 or better."""
        u, schedule = _inside(u), self.schedule
        if isinstance(schedule, VariancePreserving):
            return schedule.sigma((u * schedule.entries).floor())
        if isinstance(schedule, EDM):
            return schedule.sigma_min * (schedule.sigma_max / schedule.sigma_min) ** u
        return schedule.clamp(schedule.sigma(u))

    def density(self, sigma: Tensor) -> Tensor:
        """Probability density of log(sigma), infinite at a level that the clamp makes of many; of sigma's shape.

        Raises ValueError for the rows of a table, which have none.
        """
        if isinstance(self.schedule, RectifiedFlow):
            density = sigma / (1 + sigma) ** 2  # log(sigma) is the logit of t, so its distribution is the logistic one
            return _uncut(density, sigma, self.schedule)
        if isinstance(self.schedule, EDM):
            return torch.full_like(sigma, 1 / math.log(self.schedule.sigma_max / self.schedule.sigma_min))
        raise ValueError("the rows of a beta table have no density: take their own ELBO weight, DiscreteELBO")


@dataclass(frozen=True)
class LogNormal:
    """log(sigma) normal with this mean and standard deviation (EDM, arXiv:2206.00364, table 1).

    With a schedule, levels are cut to the range where its clock tells them apart.
    """

    mean: float = -1.2
    std: float = 1.2
    schedule: NoiseSchedule | None = None

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std of the training noise should be above 0, got {self.std}")

    def sigma(self, u: Tensor) -> Tensor:
        """Noise level at uniform numbers u inside (0, 1); of u's shape, float32 or better."""
        inside = _inside(u)
        inside = inside.cpu() if inside.device.type == "mps" else inside  # which has no ndtri
        sigma = (self.mean + self.std * torch.special.ndtri(inside).to(u.device)).exp()
        return self.schedule.clamp(sigma) if self.schedule else sigma

    def density(self, sigma: Tensor) -> Tensor:
        """Probability density of log(sigma), infinite at a level that the cut makes of many; of sigma's shape."""
        z = (sigma.log() - self.mean) / self.std
        density = (-(z**2) / 2).exp() / (self.std * math.sqrt(2 * math.pi))
        return _uncut(density, sigma, self.schedule) if self.schedule else density


@dataclass(frozen=True)
class LogitNormal(LogNormal):
    """t of the flow logit-normal (arXiv:2403.03206, section 3.1): t = sigma / (1 + sigma), so sigma is log-normal."""

    mean: float = 0.0
    std: float = 1.0


TrainingNoise = UniformTime | LogNormal


@dataclass(frozen=True)
class X0:
    """The plain square error of x_0."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class Plain:
    """1 / c_out²: the plain square error of what the network puts out (DDPM's simple loss, where that is epsilon)."""

    denoiser: Denoiser

    def __call__(self, sigma: Tensor) -> Tensor:
        return self.denoiser.coefficients(sigma).c_out ** -2


@dataclass(frozen=True)
class MinSNR:
    """Signal-to-noise ratio, at most gamma (arXiv:2303.09556): the same for epsilon and v on x_0's error.

    It fades as sigma grows; floor keeps it from going below (a step of pure noise would not be trained at all).

    Raises ValueError unless 0 <= floor <= gamma and gamma > 0.
    """

    gamma: float = 5.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not (self.gamma > 0 and 0 <= self.floor <= self.gamma):
            raise ValueError(
                f"min_snr takes 0 <= floor <= gamma and gamma > 0; got floor={self.floor:g}, gamma={self.gamma:g}"
            )

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma**-2).clamp(self.floor, self.gamma)


@dataclass(frozen=True)
class SoftMinSNR:
    """d² / (sigma² + d²): the signal-to-noise ratio where noise is strong, and no more than 1 where it is weak, with no
    corner between them (arXiv:2401.11605, section 3.4, whose gamma of 4 is 1 / d² of its pixels).

    It fades as sigma grows, as `MinSNR` does.
    """

    sigma_data: float = 1.0

    def __call__(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)


@dataclass(frozen=True)
class Debiased:
    """1 / sigma: epsilon's own error times 1 / sqrt(SNR) (arXiv:2310.08442, equation 12), at most `largest`.

    sigma below 1 / largest says nothing new about x_0; kohya-ss/sd-scripts cuts at an SNR of 1000 likewise.
    """

    largest: float = 1000**0.5

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma.clamp(min=1 / self.largest) ** -1


@dataclass(frozen=True)
class EDMWeight:
    """(sigma² + d²) / (sigma d)², d the standard deviation of the data (arXiv:2206.00364, table 1)."""

    sigma_data: float = 1.0

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True)
class DiscreteELBO:
    """Each row's term of the variational bound, (sigma_s⁻² - sigma_t⁻²) / 2, s the row before t (VDM,
    arXiv:2107.00630, the discrete-time loss). Summed over the rows: the bound in nats per dimension, up to constants.

    Before the first row comes the data, decoded by a Gaussian of the first row's variance: sigma_0⁻² / 2.
    """

    schedule: NoiseSchedule

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, VariancePreserving):
            raise ValueError(
                f"DiscreteELBO needs a beta table, got {type(self.schedule).__name__}: take ContinuousELBO"
            )
        object.__setattr__(self, "_terms", {})  # by device and type: a GPU is not waited for in every update

    def __call__(self, sigma: Tensor) -> Tensor:
        known: dict = self._terms  # type: ignore[attr-defined]
        if (where := (sigma.device, sigma.dtype)) not in known:
            snr = self.schedule.entry(torch.arange(self.schedule.entries)) ** -2
            known[where] = (torch.cat([snr[:1], snr[:-1] - snr[1:]]) / 2).to(*where)
        return known[where][self.schedule.timestep(sigma).round().long()]


@dataclass(frozen=True)
class ContinuousELBO:
    """sigma⁻² over the density of log(sigma): the mean over draws of `noise` is the integral of sigma⁻² d log(sigma),
    the variational bound in continuous time (VDM, arXiv:2107.00630), in nats per dimension."""

    noise: TrainingNoise

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma**-2 / self.noise.density(sigma)


NOISES = {"uniform": UniformTime, "log_normal": LogNormal, "logit_normal": LogitNormal}
WEIGHTS = ("plain", "min_snr", "soft_min_snr", "debiased", "edm", "x0", "elbo")


def training_noise(
    name: str, schedule: NoiseSchedule, *, mean: float | None = None, std: float | None = None
) -> TrainingNoise:
    """Distribution of training noise by its name, one of NOISES, cut to the schedule's range.

    Args:
        mean, std: of log(sigma), which is the logit of the flow's t; None takes the paper's. Not for "uniform".

    Raises:
        ValueError: an unknown name, or a mean or std for "uniform".
    """
    if name not in NOISES:
        raise ValueError(f"training noise should be one of {', '.join(NOISES)}; got {name!r}")
    given = {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
    if name == "uniform":
        if given:
            raise ValueError(f"uniform training noise has no {' and no '.join(given)}: leave out, or take log_normal")
        return UniformTime(schedule)
    return (LogNormal if name == "log_normal" else LogitNormal)(**given, schedule=schedule)


def training_weight(
    name: str, denoiser: Denoiser, noise: TrainingNoise, *, gamma: float = 5.0, floor: float = 0.0
) -> Weight:
    """Weight of the loss by its name, one of WEIGHTS.

    Args:
        denoiser: gives the schedule, what the network predicts, and the data's standard deviation.
        noise: the distribution in training, which the ELBO divides by.
        gamma, floor: of "min_snr".

    Raises:
        ValueError: an unknown name; or min-SNR without a floor, or its soft kind, on a schedule that ends in pure
            noise, where their weight, 6e-8 or less, would leave the last step untrained (but of epsilon's own error it
            is 1); or another than "elbo" for the prediction "mean".
    """
    if denoiser.prediction == "mean" and name != "elbo":
        raise ValueError(
            f"a network that predicts the mean learns by the weight elbo (its own error has no scale); got {name}"
        )
    if name == "plain":
        return Plain(denoiser)
    if name == "edm":
        return EDMWeight(denoiser.sigma_data)
    if name == "debiased":
        return Debiased()
    if name == "x0":
        return X0()
    if name == "elbo":
        table = isinstance(noise, UniformTime) and isinstance(noise.schedule, VariancePreserving)
        return DiscreteELBO(denoiser.schedule) if table else ContinuousELBO(noise)
    if name in ("min_snr", "soft_min_snr"):
        fades = denoiser.schedule.ends_in_noise and denoiser.prediction != "epsilon"
        if fades and (floor <= 0 or name == "soft_min_snr"):
            raise ValueError(
                f"{name} gives pure noise no weight, and this schedule ends in it: its last step would stay untrained; "
                "take min_snr with a floor, 0.01 for instance, or the plain weight"
            )
        return MinSNR(gamma, floor) if name == "min_snr" else SoftMinSNR(denoiser.sigma_data)
    raise ValueError(f"weight should be one of {', '.join(WEIGHTS)}; got {name!r}")


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    context: Context | None,
    sigma: Tensor,
    noise: Tensor,
    weight: Weight,
    *,
    seen: Tensor | None = None,
    huber: float = 0.0,
) -> Tensor:
    """Weighted square error of the denoiser at x = x0 + sigma * noise (arXiv:2206.00364, equation 2).

    Args:
        x0: clean latents, [B, C, H, W].
        context: keyword arguments of the network.
        sigma: noise levels, [B].
        noise: standard normal, like x0.
        weight: on the square error of x_0.
        seen: other noise for the network to see, while its target stays that of `noise`: noise + gamma * more noise
            is the input perturbation of arXiv:2301.11706, section 4.
        huber: c of the pseudo-Huber loss 2 c (sqrt(e² + c²) - c) of the network's own error e instead of e²
            (Charbonnier et al. 1997, kohya-ss/sd-scripts): the larger c, the nearer to the square; 0 is the square.

    Returns:
        [B]: the mean over C, H, W, times the weight; float32 or better.
    """
    x, target = noised(x0, sigma, noise), widened(x0)
    if seen is not None:
        x = noised(x0, sigma, seen)
        target = denoiser.to_sample(x, denoiser.network_target(x0, noise, sigma), sigma)
    square = (denoiser(x, sigma, context) - target) ** 2
    if huber:  # of the network's error, which is that of x_0 over c_out
        c = per_picture(huber * denoiser.coefficients(sigma.to(x)).c_out.abs(), x)
        square = 2 * c * square / ((square + c**2).sqrt() + c)  # that difference, without its cancellation
    return weight(sigma) * _mean(square)


@dataclass(frozen=True)
class HybridLoss:
    """The loss of a learned variance, L_simple + factor * L_vlb (arXiv:2102.09672, equation 16), called as
    `denoising_loss` is. L_vlb, in nats per dimension, does not move the mean of a step, only its variance.

    L_vlb is the sum over the T rows, here T times the term of the row drawn: levels drawn by "uniform" noise estimate
    it. Other distributions give its terms other weights, but each term's best variance is the same.

    Attributes:
        denoiser: on a beta table; not wrapped for several processes, as the one that is called may be.
    """

    denoiser: Denoiser
    factor: float = 0.001

    def __post_init__(self) -> None:
        if not isinstance(self.denoiser.schedule, VariancePreserving):
            path = type(self.denoiser.schedule).__name__
            raise ValueError(f"a learned variance is that of a step between rows of a beta table; got {path}")

    def __call__(
        self, denoiser: Denoiser, x0: Tensor, context: Context | None, sigma: Tensor, noise: Tensor, weight: Weight
    ) -> Tensor:
        x, x0 = noised(x0, sigma, noise), widened(x0)
        schedule = self.denoiser.schedule
        with self.denoiser.learned_variance() as variance:
            estimate = denoiser(x, sigma, context)
            divergence = step_divergence(x0, estimate.detach(), variance(x, sigma), sigma, schedule)
        simple = weight(sigma) * _mean((estimate - x0) ** 2)
        return simple + self.factor * schedule.entries * divergence


def step_divergence(x0: Tensor, estimate: Tensor, v: Tensor, sigma: Tensor, schedule: NoiseSchedule) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)), s the row before t: a term of L_vlb in nats per dimension, [B].

    In x = x_0 + sigma * eps that is (v log(rho) + rho^-v (1 + g (x_0 - D)²) - 1) / 2, with g = sigma_s⁻² - sigma_t⁻²
    and rho = (1 + sigma_s⁻²) / (1 + sigma_t⁻²), the large over the small variance. It is least on average where
    rho^v = 1 + g E[(x_0 - D)² | x]; v = 0 leaves `DiscreteELBO`. At the first row, whose step to x_0 adds no noise, 0.

    Args:
        estimate: of x_0, D at sigma.
        v: from the small log-variance (0) to the large one (1), like x0.
        sigma: noise levels of t, [B].
    """
    lower = row_before(schedule, sigma).clamp(min=schedule.sigma_min)
    snr_s, snr_t = (per_picture(level**-2, x0) for level in (lower, sigma))
    log_ratio = v * (torch.log1p(snr_s) - torch.log1p(snr_t))
    return _mean(log_ratio + (-log_ratio).exp() * (1 + (snr_s - snr_t) * (x0 - estimate) ** 2) - 1) / 2


def _mean(values: Tensor) -> Tensor:
    """Over all but the first dimension: [B]."""
    return values.flatten(1).mean(1)


def _uncut(density: Tensor, sigma: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The density, infinite at both ends of the schedule's range, where a clamp gathers levels."""
    least, most = schedule.clamp(torch.tensor([0.0, math.inf], dtype=sigma.dtype)).tolist()
    return density.where((least < sigma) & (sigma < most), math.inf)


def _inside(u: Tensor) -> Tensor:
    """u in float32 or better, kept off 0 and 1, which a generator may give and where a quantile is infinite."""
    return widened(u).clamp(2**-24, 1 - 2**-24)
