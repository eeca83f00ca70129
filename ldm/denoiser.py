"""The one equation: a network F becomes the denoiser D(x, sigma, context), an estimate of E[x_0 | x].

    x = x_0 + sigma * eps            D = c_skip * x + c_out * F(alpha * x, timestep(sigma), context)

The schedule fixes alpha and the clock; what the network predicts fixes c_skip and c_out (docs/equations.md).
The small functions below turn the estimate of x_0 into what else the papers speak of, all at x = x_0 + sigma * eps.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from ldm.schedule import EDM, NoiseSchedule, RectifiedFlow, VariancePreserving

Denoise = Callable[[Tensor, Tensor | float], Tensor]  # (x [B, ...], sigma [B] or one number) -> estimate of x_0, like x
Context = Mapping[str, Any]  # tensors, or dicts of tensors, named as UNet2DConditionModel.forward names its arguments


class Coefficients(NamedTuple):
    c_skip: Tensor
    c_out: Tensor


def _mean(path: NoiseSchedule, sigma: Tensor, d: float) -> Coefficients:
    """F = alpha_s ((1 - r²) x_0 + r² x), r = lower / sigma, solved for x_0."""
    lower = row_before(path, sigma)
    gap = (sigma - lower) * (sigma + lower)  # neighbouring rows differ by a hundredth: their squares would cancel
    return Coefficients(-(lower**2) / gap, sigma**2 / gap / path.alpha(lower))


# Each from (schedule, sigma, d), in the shape of sigma; d is the standard deviation of the data.
PREDICTIONS: dict[str, Callable[[NoiseSchedule, Tensor, float], Coefficients]] = {
    "sample": lambda path, sigma, d: Coefficients(torch.zeros_like(sigma), torch.ones_like(sigma)),
    "epsilon": lambda path, sigma, d: Coefficients(torch.ones_like(sigma), -sigma),
    "v": lambda path, sigma, d: Coefficients(path.alpha(sigma) ** 2, -sigma * path.alpha(sigma)),
    "velocity": lambda path, sigma, d: Coefficients(path.alpha(sigma), -sigma * path.alpha(sigma)),
    "edm": lambda path, sigma, d: Coefficients(d**2 * path.alpha(sigma) ** 2, d * sigma * path.alpha(sigma)),
    "mean": _mean,
}


class Denoiser(nn.Module):
    """A network in its preconditioning (arXiv:2206.00364, equation 7, of which the other predictions are cases).

    Args:
        network: called as network(alpha * x, timestep, **context), the first in the network's own dtype, the second
            [B] in float32 or better; returns a tensor shaped as x, or of twice its channels (`learned_variance`).
        schedule: gives alpha and the clock.
        prediction: what the network's output means, one of PREDICTIONS: "sample" (x_0), "epsilon" (the noise),
            "v" (arXiv:2202.00512), "velocity" (eps - x_0, arXiv:2209.03003), "edm" (arXiv:2206.00364, table 1) or
            "mean" (of q(x_s | x_t, x_0) in the papers' units, s the row before: arXiv:2006.11239, equation 7).
        sigma_data: standard deviation of the data, for EDM; latents on the other paths have 1.

    Raises:
        ValueError: an unknown prediction, or one that does not fit the path.
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, prediction: str, sigma_data: float = 1.0):
        super().__init__()
        _check_fit(schedule, prediction, sigma_data)
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor | float, context: Context | None = None) -> Tensor:
        """Estimate of x_0 from x = x_0 + sigma * eps.

        Args:
            x: [B, C, H, W].
            sigma: noise level, [B] or one number.
            context: keyword arguments of the network; and "concat" [B, C', H, W], if there is one, which goes into
                the network behind the scaled x as more channels (what inpainting models are shown).

        Returns:
            [B, C, H, W] in float32, or in float64 where x is.

        Raises:
            ValueError: a network of half precision that predicts the mean.
        """
        x, sigma = widened(x), self._level(x, sigma)
        scaled = per_picture(self.schedule.alpha(sigma), x) * x
        weight = next(self.network.parameters(), None)
        if weight is not None:
            scaled = scaled.to(weight.dtype)
        arguments = dict(context or {})
        if (beside := arguments.pop("concat", None)) is not None:
            scaled = torch.cat([scaled, beside.to(scaled)], dim=1)
        output = self.network(scaled, self.schedule.timestep(sigma), **arguments)
        if self.prediction == "mean" and output.dtype.itemsize < 4:
            raise ValueError(
                "the mean of a step differs from x by a thousandth of it, which half precision rounds away: run a "
                "network that predicts it in float32 (dtype=torch.float32; in training --mixed-precision no)"
            )
        return self.to_sample(x, output[:, : x.shape[1]], sigma)

    @contextmanager
    def learned_variance(self) -> Iterator[Callable[[Tensor, Tensor | float], Tensor]]:
        """A context in which a network of 2 C channels tells its variance: it yields what gives that of the last run.

        Its last C are 2 v - 1: at -1 the log-variance of a step is the small one, at 1 the large one
        (arXiv:2102.09672, equation 15, and its code; diffusers' "learned_range").

        Yields:
            (x, sigma) -> v like x, which `samplers.ddpm` and `elbo.ancestral_step` take. To be called right after the
            denoiser. Where that was guided, in a batch of null and condition, the variance is the condition's.
        """
        kept: list[Tensor] = []

        def variance(x: Tensor, sigma: Tensor | float) -> Tensor:
            output = kept[0][-len(x) :]
            if output.shape[1] != 2 * x.shape[1]:
                raise ValueError(
                    f"a learned variance needs a network of {2 * x.shape[1]} output channels, two for each of x; "
                    f"this one has {output.shape[1]}"
                )
            return (output[:, x.shape[1] :].to(widened(x).dtype) + 1) / 2

        def keep(network: nn.Module, args: Any, output: Tensor) -> None:
            kept[:] = [output]

        hook = self.network.register_forward_hook(keep)
        try:
            yield variance
        finally:
            hook.remove()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """c_skip and c_out at noise level sigma, each in its shape."""
        return PREDICTIONS[self.prediction](self.schedule, sigma, self.sigma_data)

    def to_sample(self, x: Tensor, output: Tensor, sigma: Tensor | float) -> Tensor:
        """Estimate of x_0 from the network's output at x; like x."""
        x = widened(x)
        c_skip, c_out = self.coefficients(self._level(x, sigma))
        return per_picture(c_skip, x) * x + per_picture(c_out, x) * output.to(x.dtype)

    def to_output(self, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
        """The network's output at x that stands for an estimate of x_0: the inverse of `to_sample`."""
        x = widened(x)
        c_skip, c_out = self.coefficients(self._level(x, sigma))
        return (x0 - per_picture(c_skip, x) * x) / per_picture(c_out, x)

    def network_target(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """What the network should put out at x = x0 + sigma * noise; like x0."""
        return self.to_output(noised(x0, self._level(x0, sigma), noise), widened(x0), sigma)

    @staticmethod
    def _level(x: Tensor, sigma: Tensor | float) -> Tensor:
        """Sigma as [B], on x's device, in float32 or better."""
        dtype = widened(x).dtype
        if not isinstance(sigma, Tensor):
            return torch.full((len(x),), sigma, dtype=dtype, device=x.device)
        if sigma.ndim > 1 or sigma.numel() not in (1, len(x)):
            raise ValueError(f"sigma should be one number or [{len(x)}], one for each of x; got {tuple(sigma.shape)}")
        return sigma.to(x.device, dtype).expand(len(x))


def epsilon_from(x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """The noise in x if x_0 is the estimate; dx/dsigma of the probability flow (arXiv:2206.00364, equation 1)."""
    return (x - x0) / per_picture(sigma, x)


def score_from(x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """Gradient of the log-density of x (Tweedie's formula). For that of x_t = alpha * x divide by alpha."""
    return (x0 - x) / per_picture(sigma, x) ** 2


def v_from(x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """v = alpha_t eps - sigma_t x_0 where alpha_t² + sigma_t² = 1: variance preserving (arXiv:2202.00512, app. D)."""
    sigma = per_picture(sigma, x)
    return ((x - x0) / sigma - sigma * x0) / (1 + sigma**2) ** 0.5


def velocity_from(x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """Velocity eps - x_0 of the straight path (arXiv:2209.03003)."""
    return (x - x0) / per_picture(sigma, x) - x0


def sample_from_epsilon(x: Tensor, epsilon: Tensor, sigma: Tensor | float) -> Tensor:
    """Estimate of x_0 from one of the noise: the inverse of `epsilon_from`."""
    return x - per_picture(sigma, x) * epsilon


def sample_from_score(x: Tensor, score: Tensor, sigma: Tensor | float) -> Tensor:
    """Estimate of x_0 from the score at x (Tweedie's formula): the inverse of `score_from`."""
    return x + per_picture(sigma, x) ** 2 * score


def sample_from_v(x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """Estimate of x_0 from v: the inverse of `v_from`."""
    sigma = per_picture(sigma, x)
    return x / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * v


def sample_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """Estimate of x_0 from the velocity: the inverse of `velocity_from`."""
    sigma = per_picture(sigma, x)
    return (x - sigma * velocity) / (1 + sigma)


def row_before(schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
    """Noise level a row of the beta table below sigma; of its shape.

    Before the first row comes x_0, level 0. Between rows the level falls as the clock does, and linearly to 0 between
    the second and the first.
    """
    t = schedule.timestep(sigma)
    return torch.where(t < 1, t * schedule.sigma_min, schedule.sigma(t - 1))


def _check_fit(schedule: NoiseSchedule, prediction: str, sigma_data: float) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction should be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
    path = type(schedule).__name__
    d = schedule.sigma_data if isinstance(schedule, EDM) else 1.0
    if sigma_data != d:
        raise ValueError(f"sigma_data is {d} on this {path} schedule, got sigma_data={sigma_data}: give both the same")
    # v and velocity are sums of x_0 and eps whose factors belong to one path.
    unit = isinstance(schedule, VariancePreserving) or (isinstance(schedule, EDM) and d == 1)
    if prediction == "v" and not unit:
        raise ValueError(f"v-prediction needs alpha² = 1 / (1 + sigma²), which is VariancePreserving; got {path}")
    if prediction == "velocity" and not isinstance(schedule, RectifiedFlow):
        raise ValueError(f"velocity is that of the straight path, which is RectifiedFlow; got {path}")
    if prediction == "edm" and isinstance(schedule, RectifiedFlow):
        raise ValueError(f"edm-prediction needs alpha² = 1 / (d² + sigma²), which is EDM; got {path}")
    if prediction == "mean" and not isinstance(schedule, VariancePreserving):
        raise ValueError(f"the mean is that of a step between rows of a beta table, VariancePreserving; got {path}")
    if prediction in ("epsilon", "mean") and schedule.clamped:
        raise ValueError(
            f"this {path} schedule ends in pure noise, which says nothing about x_0, and an error of {prediction} "
            f"grows by about sigma = {schedule.sigma_max:g}: take sample, or v or velocity where they fit"
        )


def noised(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x = x_0 + sigma * eps in float32 or better; sigma: [B], or one number."""
    x0 = widened(x0)
    return x0 + per_picture(sigma.to(x0), x0) * noise


def widened(x: Tensor) -> Tensor:
    """x in float32 at least: nothing outside the network is computed in half precision."""
    return x if x.dtype == torch.float64 else x.float()


@overload
def per_picture(values: Tensor, x: Tensor) -> Tensor: ...


@overload
def per_picture(values: Tensor | float, x: Tensor) -> Tensor | float: ...


def per_picture(values: Tensor | float, x: Tensor) -> Tensor | float:
    """Values [B] shaped to multiply x [B, ...]; one number stays one number."""
    if isinstance(values, Tensor) and values.ndim:
        return values.view(-1, *[1] * (x.ndim - 1))
    return values
