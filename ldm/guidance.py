"""Guidance: a denoiser bent towards its condition. It wraps D and returns a D; no sampler knows of it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.denoiser import Context, Denoise, Denoiser, per_picture


def classifier_free(
    denoiser: Denoiser,
    cond: Context,
    uncond: Context,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """Classifier-free guidance (arXiv:2207.12598, equation 6, with scale = w + 1): uncond + scale * (cond - uncond).

    Guiding is linear, so on estimates of x_0 it is what it is on epsilon or v. Both contexts go through the network in
    one batch of 2 B; where only the condition counts (scale 1, or sigma outside the interval), it alone does.

    Args:
        denoiser: the model; `rescale` needs to know what its network puts out.
        cond, uncond: contexts of the same names and shapes, batch B.
        scale: 1 is the condition alone, 0 the null alone.
        rescale: how far, 0 to 1, the standard deviation of each picture's guided network output is brought back to
            that of the conditional one (arXiv:2305.08891, section 3.4; diffusers' guidance_rescale). Taken on
            what the network puts out (epsilon, v, ...), as there: on x_0 it would be something else.
        interval: (low, high): guide only where low < sigma <= high (arXiv:2404.07724).

    Returns:
        (x [B, C, H, W], sigma) -> estimate of x_0.

    Raises:
        ValueError: contexts that differ in names or shapes, rescale outside 0 to 1, an empty interval.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale should be between 0 and 1, got {rescale}")
    if interval and not interval[0] < interval[1]:
        raise ValueError(f"interval should be (low, high) with low < high, in sigma; got {interval}")
    both = _joined(uncond, cond)

    def denoise(x: Tensor, sigma: Tensor | float) -> Tensor:
        inside = None  # everywhere, which a GPU need not be asked about
        if interval:
            level = sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64)
            inside = (interval[0] < level) & (level <= interval[1])
        if scale == 1 or (inside is not None and not bool(inside.any())):
            return denoiser(x, sigma, cond)
        twice = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.numel() > 1 else sigma
        x0_uncond, x0_cond = denoiser(torch.cat([x, x]), twice, both).chunk(2)
        guided = x0_uncond + scale * (x0_cond - x0_uncond)
        if rescale:
            wanted, output = denoiser.to_output(x, x0_cond, sigma), denoiser.to_output(x, guided, sigma)
            ratio = _deviation(wanted) / _deviation(output)
            guided = denoiser.to_sample(x, output * (rescale * ratio + 1 - rescale), sigma)
        if inside is None or bool(inside.all()):
            return guided
        return torch.where(per_picture(inside.to(x.device), x), guided, x0_cond)

    return denoise


def classifier_guided(
    denoise: Denoise, log_probability: Callable[[Tensor, Tensor | float], Tensor], scale: float = 1.0
) -> Denoise:
    """Classifier guidance (arXiv:2105.05233, equation 14): the score plus scale * grad log p(y | x; sigma).

    On the estimate of x_0 that is D + scale * sigma² * gradient. With scale 1 and a classifier of noisy pictures it is
    the denoiser of p(x | y) exactly; with another it has at each noise level the score of p(x) p(y | x)^scale,
    densities that are not one under growing noise.

    Args:
        denoise: the unconditional denoiser.
        log_probability: (x [B, ...], sigma) -> log p(y | x; sigma) [B], each row of x and the class wished for it;
            differentiable in x.
        scale: 0 leaves the classifier out.
    """
    if scale == 0:
        return denoise

    def guided(x: Tensor, sigma: Tensor | float) -> Tensor:
        live = x.requires_grad and torch.is_grad_enabled()  # whoever differentiates, as a likelihood, needs this, too
        with torch.inference_mode(False), torch.enable_grad():
            place = x if live else x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(log_probability(place, sigma).sum(), place, create_graph=live)
        return denoise(x, sigma) + scale * per_picture(sigma, x) ** 2 * gradient

    return guided


def autoguided(denoise: Denoise, weaker: Denoise, scale: float) -> Denoise:
    """Autoguidance (arXiv:2406.02507, section 4): weaker + scale * (denoise - weaker), away from a model's mistakes.

    The weaker one gets the same input and condition: a smaller network or an early checkpoint, which makes the same
    mistakes, larger. Scale 1 is `denoise` alone; either may be guided by other means already.
    """
    if scale == 1:
        return denoise

    def guided(x: Tensor, sigma: Tensor | float) -> Tensor:
        poor = weaker(x, sigma)
        return poor + scale * (denoise(x, sigma) - poor)

    return guided


def _joined(uncond: Mapping[str, Any], cond: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Both contexts as one batch, the null first."""
    if uncond.keys() != cond.keys():
        raise ValueError(
            f"guidance needs the same names in both contexts{name and ' at ' + name}: the condition has "
            f"{sorted(cond)}, the null {sorted(uncond)}"
        )
    joined: dict[str, Any] = {}
    for key, value in cond.items():
        null = uncond[key]
        if isinstance(value, Mapping):
            joined[key] = _joined(null, value, key)
        elif value.shape != null.shape:
            raise ValueError(
                f"guidance needs {key} of one shape: the condition has {tuple(value.shape)}, the null "
                f"{tuple(null.shape)}; encode both to the same batch and length"
            )
        else:
            joined[key] = torch.cat([null, value])
    return joined


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of each picture: [B, 1, 1, 1]."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
