"""What an inpainting U-Net is shown in training: masks, and what lies around (Rombach et al. 2022, section 4.5)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.autoencoder import Autoencoder, Identity

EVERYTHING = 0.25  # share of the masks that leave nothing of the picture, so that the model can paint from nothing


def draw_mask(draw: torch.Generator, height: int, width: int) -> Tensor:
    """[1, height, width], 1 where to paint: everything, or up to four boxes and ellipses of any size."""
    kind, number, *numbers = torch.rand(22, generator=draw).tolist()
    if kind < EVERYTHING:
        return torch.ones(1, height, width)
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)[None]
    mask = torch.zeros(height, width, dtype=torch.bool)
    for i in range(1 + int(4 * number)):
        round_, top, left, tall, wide = numbers[5 * i : 5 * i + 5]
        down, across = (y - top) / (0.1 + 0.4 * tall), (x - left) / (0.1 + 0.4 * wide)  # within 1 of the middle
        mask |= (down**2 + across**2 <= 1) if round_ < 0.5 else ((down.abs() <= 1) & (across.abs() <= 1))
    return mask[None].float()


@torch.no_grad()
def shown_beside(vae: Autoencoder | Identity, pixels: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """What goes into the U-Net beside x: [B, 1 + C, h, w], the mask and the masked picture's latents.

    pixels: [B, 3, H, W] in [-1, 1]. mask: [B, 1, H, W]. noise: of the posterior, [B, C, h, w].
    """
    masked = vae.encode(pixels * (mask < 0.5)).sample(noise)  # grey where to paint, as in diffusers
    return torch.cat([F.interpolate(mask, size=masked.shape[2:]), masked], dim=1)


@torch.no_grad()
def nothing_known(vae: Autoencoder | Identity, latents: Tensor) -> Tensor:
    """`shown_beside` where everything is to be painted, for as many latents [B, C, h, w] of that size."""
    height, width = (side * vae.downscale for side in latents.shape[2:])
    grey = torch.zeros(1, 3, height, width, device=latents.device)
    known = vae.encode(grey).mean.expand(len(latents), -1, -1, -1)
    return torch.cat([torch.ones_like(known[:, :1]), known], dim=1)
