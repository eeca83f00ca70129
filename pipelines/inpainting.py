"""Where sampling begins: from noise, from a picture, or from a picture of which a part is painted (inpainting).

Two kinds of model inpaint. One was trained to: its U-Net takes the mask and the masked picture beside the latents
(Rombach et al., 2022, section 4.5; 9 channels in Stable Diffusion's). For any other the picture is put back, at the
noise level of each step, where nothing is to be painted (arXiv:2011.13456, appendix I.2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ldm.denoiser import Denoise, per_picture
from pipelines.folder import Model
from pipelines.image import eight_bits, image_batch


@dataclass(frozen=True)
class Start:
    """What sampling begins with. Latents are [B, C, h, w], the mask [B, 1, h, w], 1 where to paint."""

    x: Tensor  # at the first noise level, `sigma`
    sigma: float
    noise: Tensor  # unit normal, in x
    beside: Tensor | None = None  # what the U-Net of an inpainting model takes beside x, [B, 1 + C, h, w]
    known: Tensor | None = None  # the picture, which stays outside of the mask
    mask: Tensor | None = None

    def hold(self, denoise: Denoise) -> Denoise:
        """A denoiser that paints inside the mask alone, for a model that was not trained to; else the one given."""
        if self.known is None or self.mask is None:
            return denoise
        return keep_known(denoise, self.known, self.noise, self.mask, self.sigma)

    def finish(self, x: Tensor) -> Tensor:
        """The latents where sampling ended, with the picture outside of the mask."""
        if self.known is None or self.mask is None:
            return x
        return torch.where(self.mask < 0.5, self.known, x)


def check_mask(model: Model, image: Any, mask: Any) -> None:
    """Raises ValueError where one is missing that the other, or the model, needs."""
    if model.inpaints and (image is None or mask is None):
        raise ValueError("this is an inpainting model: give image= and mask=, which is white where to paint")
    if mask is not None and image is None:
        raise ValueError("a mask says where to paint on a picture: give image=, too")


def begin(
    model: Model,
    image: Tensor | None,
    mask: Tensor | None,
    strength: float,
    unit: Tensor,
    draw: Callable[[Tensor], Tensor] | None,
    sigma: float,
    initial_scale: float,
) -> Start:
    """The start at noise level sigma.

    Args:
        image: [B, 3, H, W] in [-1, 1], or None to begin from noise.
        mask: of `mask_batch`, or None.
        strength: at 1 a masked picture begins from noise as well, as in diffusers.
        unit: first draw of noise, like the latents.
        draw: gives the next; None where the latents were given: then posteriors give their modes.
        initial_scale: what unit-normal latents are multiplied by to start at sigma.
    """
    noisy = image is None or (mask is not None and strength == 1)
    dtype = next(model.unet.parameters()).dtype
    known = beside = None
    small = None if mask is None else _of_latents(mask, unit)
    if image is not None and not (noisy and model.inpaints):
        # The first draw is the posterior's, the second the noise, as in diffusers.
        posterior = model.vae.encode(image.to(unit.device, dtype))
        known, unit = (posterior.sample(unit), draw(unit)) if draw else (posterior.mode, unit)
    if image is not None and mask is not None:
        assert small is not None
        third = draw(unit) if draw else None  # diffusers draws it for any model: the sampler's draws come after it
        if model.inpaints:
            posterior = model.vae.encode((image * (mask < 0.5)).to(unit.device, dtype))
            beside = torch.cat([small, posterior.mode if third is None else posterior.sample(third)], dim=1)
    x = unit * initial_scale if noisy or known is None else known + sigma * unit
    if model.inpaints or mask is None:
        return Start(x, sigma, unit, beside)
    return Start(x, sigma, unit, None, known, small)


def _of_latents(mask: Tensor, unit: Tensor) -> Tensor:
    """A mask of pixels at the latents' resolution, of the pixel at each one's corner (as diffusers): [B, 1, h, w].

    Raises ValueError where that leaves nothing to paint of a mask that has white.
    """
    small = F.interpolate(mask, size=unit.shape[2:])
    if lost := [i for i, one in enumerate(mask) if one.any() and not small[i].any()]:
        raise ValueError(
            f"mask: what is white of number {lost[0]} is thinner than a latent, {mask.shape[2] // unit.shape[2]} "
            "pixels, and nothing would be painted: make it larger"
        )
    return small.to(unit.device)


def mask_batch(mask: Any, pictures: int, per_prompt: int, height: int, width: int) -> Tensor:
    """[pictures, 1, height, width]: 1 where to paint, 0 where the picture stays.

    mask: one for all prompts or one for each, white (from one half on) where to paint: PIL pictures, or numbers in
    [0, 1] or booleans [H, W], [N, 1, H, W] or, as arrays, [N, H, W, 1], N optional. Resized to height × width.

    Raises ValueError for another type or another number of masks.
    """
    masks = [_grey(one) for one in (mask if isinstance(mask, list | tuple) else [mask])]
    try:
        grey = image_batch(masks, pictures, per_prompt, height, width, 1)[:, :1]
    except ValueError as error:
        raise ValueError(f"mask, white where to paint: {str(error).removeprefix('image: ')}") from None
    return (grey >= 0).float()


def keep_known(denoise: Denoise, known: Tensor, noise: Tensor, mask: Tensor, begin: float) -> Denoise:
    """Holds a picture outside of a mask, for any model and sampler.

    There the denoiser sees the picture at the level's noise, and its estimate is the picture itself, so that the
    sampler walks to it. (diffusers puts it back after each step, which is the same to the network.)

    Args:
        known: the picture's latents [B, C, h, w].
        noise: unit normal like `known`, the same at every level.
        mask: [B, 1, h, w], 1 where to paint.
        begin: the first noise level, at which x is taken as it was begun with.

    Returns:
        (x, sigma) -> estimate of x_0.
    """

    def kept(x: Tensor, sigma: Tensor | float) -> Tensor:
        level = per_picture(sigma.to(x.device) if isinstance(sigma, Tensor) else sigma, x)
        seen = torch.where((mask < 0.5) & (level < begin), known + level * noise, x)
        return torch.where(mask < 0.5, known, denoise(seen, sigma))

    return kept


def _grey(mask: Any) -> Any:
    """A mask as `image_batch` takes pictures."""
    if isinstance(mask, Image.Image):
        return eight_bits(ImageOps.exif_transpose(mask)).convert("L")
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask)
        mask = mask.movedim(-1, -3) if mask.ndim > 2 and mask.shape[-1] in (1, 3) else mask
    if not isinstance(mask, Tensor):
        return mask
    mask = mask.float() if mask.dtype == torch.bool else mask
    mask = mask[None] if mask.ndim == 2 else mask
    return mask.expand(*mask.shape[:-3], 3, *mask.shape[-2:]) if mask.ndim > 2 and mask.shape[-3] == 1 else mask
