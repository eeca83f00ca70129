"""What an autoencoder is trained on: functions over tensors, and the discriminator. The loop is `train/vae.py`'s.

Pictures are [B, C, H, W] in [-1, 1]. Losses are means over a picture's values, so that a weight means the same for
every size of crop.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.autoencoder import Posterior

ROUNDING = (2 / 255) ** 2 / 12  # variance of the rounding of pixels in [-1, 1] to 8 bits
Perceptual = Callable[[Tensor, Tensor], Tensor]  # two batches of pictures -> distance [B]
Mean = Callable[[Tensor], Tensor]  # over processes


def same(value: Tensor) -> Tensor:
    """The mean over one process."""
    return value


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms; a zero leaves its term out."""

    pixel: float = 1.0  # L1 of the pictures
    squared: float = 4.0  # their mean squared difference, which PSNR measures
    gradient: float = 0.25  # L1 of the differences between neighbours: edges
    kl: float = 1e-5  # nats for each latent value
    halved: float = 0.0  # what the latents averaged over 2×2 give, beside the picture averaged likewise
    elbo: float = 0.0  # a plain VAE's bound: 1, and every other weight 0
    texture: float = 0.0  # L1 of how much fine detail there is around each place, wherever it lies
    perceptual: float = 0.0  # LPIPS, see `load_perceptual`
    adversarial: float = 0.0  # times the adaptive weight
    adversarial_start: int = 0  # updates before which there is no adversarial term

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"{name}={value!r} must not be negative: use 0 to leave the term out.")


def pixel_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference: [B]."""
    return (output - target).abs().flatten(1).mean(1)


def squared_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference: [B]."""
    return (output - target).square().flatten(1).mean(1)


def gradient_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference between the finite differences, along both axes: [B].

    As Mathieu et al. (2016), equation 6, who take the absolute values before the difference.
    """
    error = output - target
    along_y, along_x = error.diff(dim=2), error.diff(dim=3)
    return along_y.abs().flatten(1).mean(1) + along_x.abs().flatten(1).mean(1)


def local_detail(images: Tensor) -> Iterator[Tensor]:
    """How strong fine detail is around each place, of four directions and two sizes: eight times [B, C, h, w].

    These are root mean squares of the differences between neighbours, along rows, columns and both diagonals, in
    windows of 8×8 pixels, one in every four; of the pictures, and of their averages over 2×2.
    """
    for halvings in range(2):
        x = F.avg_pool2d(images, 2) if halvings else images
        here, above, left, corner = x[..., 1:, 1:], x[..., :-1, 1:], x[..., 1:, :-1], x[..., :-1, :-1]
        for difference in (here - above, here - left, here - corner, left - above):
            power = F.avg_pool2d(difference.square(), 8 >> halvings, 4 >> halvings)
            yield (power + 1e-4).sqrt()  # about one grey level: a root is vertical at 0


def texture_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference between the pictures' local detail: [B].

    Latents do not say where each bristle lies. What errs least, pixel by pixel, is then a blur; this asks for as much
    detail, in the same directions, wherever it lies. A few of the statistics that textures can be made from (Portilla
    & Simoncelli, "A parametric texture model based on joint statistics of complex wavelet coefficients", 2000).
    """
    pairs = zip(local_detail(output), local_detail(target), strict=True)
    return torch.stack([(ours - theirs).abs().flatten(1).mean(1) for ours, theirs in pairs]).mean(0)


def halved_loss(halved: Tensor, target: Tensor, weights: LossWeights) -> Tensor:
    """The pictures' terms at half the resolution, which ties coarse latents to coarse pictures: [B].

    Latents whose fine frequencies are not those of the picture are hard to diffuse (Skorokhodov et al., "Improving the
    diffusability of autoencoders", 2025, equation 6; Kouzelis et al., "EQ-VAE", 2025, who turn pictures as well).
    """
    target = F.avg_pool2d(target, 2)
    return (
        weights.pixel * pixel_loss(halved, target)
        + weights.squared * squared_loss(halved, target)
        + weights.gradient * gradient_loss(halved, target)
    )


def kl_loss(posterior: Posterior) -> Tensor:
    """KL to the unit normal, in nats for each raw latent value: [B].

    The LDM code (Rombach et al., 2022, section G) sums over pixels and latents instead: its weight w is
    w * latent_channels / (3 * downscale**2) here, 2.1e-8 for its 1e-6 with KL-f8.
    """
    return posterior.kl() / posterior.mean[0].numel()


def elbo_loss(output: Tensor, target: Tensor, posterior: Posterior, mean: Mean = same) -> Tensor:
    """The negative variational bound (Kingma & Welling, 2014, eq. 3), in nats of density for each value: [B].

    The decoder is Gaussian around its output, with the one variance that makes the batch likeliest, its mean square
    error (Rybkin et al., "Simple and effective VAE training with calibrated decoders", 2021), but no less than what
    rounding to 8 bits adds.
    """
    error = squared_loss(output, target)
    variance = mean(error.detach().mean()).clamp(min=ROUNDING)  # where it is best, the bound does not depend on it
    return (error / variance + variance.log() + math.log(2 * math.pi)) / 2 + posterior.kl() / target[0].numel()


def autoencoder_loss(
    output: Tensor,
    target: Tensor,
    posterior: Posterior,
    weights: LossWeights,
    perceptual: Perceptual | None = None,
    halved: Tensor | None = None,
    mean: Mean = same,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Everything but the adversarial term.

    halved: [B, C, H / 2, W / 2], what the latents give that were averaged over 2×2, where that has a weight.
    mean: over the processes, of what the whole batch decides.

    Returns:
        The weighted sum, a scalar, and the terms by name before weighting, each [B] and detached.

    Raises:
        ValueError: a perceptual weight without a perceptual loss.
    """
    if weights.perceptual and perceptual is None:
        raise ValueError("The perceptual weight is positive: pass perceptual=load_perceptual(), or set it to 0.")
    output, target = output.float(), target.float()
    terms: dict[str, Tensor] = {}
    if weights.pixel:
        terms["pixel"] = pixel_loss(output, target)
    if weights.squared:
        terms["squared"] = squared_loss(output, target)
    if weights.gradient:
        terms["gradient"] = gradient_loss(output, target)
    if weights.halved and halved is not None:
        terms["halved"] = halved_loss(halved.float(), target, weights)
    if weights.texture:
        terms["texture"] = texture_loss(output, target)
    if weights.kl:
        terms["kl"] = kl_loss(posterior)
    if weights.elbo:
        terms["elbo"] = elbo_loss(output, target, posterior, mean)
    if weights.perceptual and perceptual is not None:
        terms["perceptual"] = perceptual(output, target)
    total = sum((getattr(weights, name) * term.mean() for name, term in terms.items()), output.new_zeros(()))
    return total, {name: term.detach() for name, term in terms.items()}


def load_perceptual(network: str = "vgg") -> nn.Module:
    """LPIPS (Zhang et al., 2018), from the `lpips` package: a `Perceptual` that `.to(device)` moves.

    Args:
        network: "vgg", "alex" or "squeeze".

    Raises:
        ValueError: the package is not installed, or its weights are neither on this machine nor within reach.
    """
    if network not in ("vgg", "alex", "squeeze"):
        raise ValueError(f"network={network!r}: LPIPS has 'vgg', 'alex' and 'squeeze'.")
    advice = "or set the perceptual weight to 0: training needs none."
    try:
        import lpips
    except ImportError as error:
        raise ValueError(
            f"The perceptual loss needs LPIPS: pip install 'atelier-diffusion[lpips]', {advice}"
        ) from error
    try:
        metric = lpips.LPIPS(net=network, verbose=False)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise ValueError(
            f"The weights of LPIPS could not be had ({error}): run this once where torchvision can download its "
            f"{network} weights and copy {folder} over, {advice}"
        ) from error
    return _Lpips(metric)


class _Lpips(nn.Module):
    def __init__(self, metric: nn.Module):
        super().__init__()
        self.metric = metric.eval().requires_grad_(False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.metric(output, target).flatten()


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches, not whole pictures (PatchGAN; Isola et al., 2017, section 3.2.2).

    Args:
        channels: of the pictures.
        width: of the first layer; each further one doubles it, up to eight times.
        layers: halvings; patches are 70 pixels wide for 3, 34 for 2.
        norm: "group" (8 groups where the width allows), or "spectral" for spectrally normalised weights (Miyato
            et al., 2018). Not batch norm, whose statistics differ between real and generated batches and processes.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3, norm: str = "group"):
        super().__init__()
        if norm not in ("group", "spectral"):
            raise ValueError(f"norm={norm!r}: expected 'group' or 'spectral'.")
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            blocks.append(nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1))
            if norm == "group":
                blocks.append(nn.GroupNorm(math.gcd(widths[i + 1], 8), widths[i + 1]))
            blocks.append(nn.LeakyReLU(0.2))
        blocks.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        if norm == "spectral":
            blocks = [nn.utils.parametrizations.spectral_norm(b) if isinstance(b, nn.Conv2d) else b for b in blocks]
        self.layers = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, C, H, W] -> logits [B, 1, h, w], one a patch, high where it looks real."""
        return self.layers(images)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator's logits, a scalar (Lim & Ye, 2017). Detach the generated pictures first."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the autoencoder minimises, a scalar: the logits of its pictures, negated."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    *,
    maximum: float = 1e4,
    eps: float = 1e-4,
    mean: Mean = same,
    scale: float = 1.0,
) -> Tensor:
    """|grad reconstruction| / (|grad adversarial| + eps) at the decoder's last layer, at most `maximum`.

    Times this, both losses pull equally hard (Esser et al., 2021, "Taming transformers", equation 7). The graph of
    both losses is kept; the result, a scalar, is a constant.

    Args:
        reconstruction, adversarial: scalars.
        last_layer: `Autoencoder.last_layer`.
        mean: over the processes, of gradients.
        scale: of the losses in between, which keeps gradients in float16 from 0.
    """
    (wanted,) = torch.autograd.grad(scale * reconstruction, last_layer, retain_graph=True)
    (got,) = torch.autograd.grad(scale * adversarial, last_layer, retain_graph=True)
    wanted, got = mean(wanted) / scale, mean(got) / scale
    ratio = (wanted.norm() / (got.norm() + eps)).detach()
    return ratio.nan_to_num(nan=0.0).clamp(max=maximum)  # of gradients that overflow in float16: the step is left out


def adversarial_weight(weights: LossWeights, step: int) -> float:
    """0 before update `adversarial_start`, then the weight: an untrained decoder has nothing to be judged for."""
    return weights.adversarial if step >= weights.adversarial_start else 0.0
