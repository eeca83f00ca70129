"""Pictures as codes and back: the diffusion autoencoder (Preechakul et al. 2022, arXiv:2111.15640).

    pipe = DiffusionAutoencoderPipeline.from_pretrained("runs/diffae")
    codes = pipe.encode(pictures)      # what they show, and the noise that they come from
    pipe.decode(codes)                 # the same pictures, nearly
    pipe.vary(pictures)                # others that show the same

The semantic encoder says what a picture shows; told that, the probability flow is followed from the picture up to its
noise (DDIM's inversion), and from noise down to a picture. `train/diffae.py` trains such a model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image, ImageOps
from torch import Tensor

from conditioning.semantic import SemanticEncoder
from ldm.denoiser import Denoise
from ldm.samplers import SAMPLERS, invert
from ldm.schedule import step_grid
from ldm.unet import UNet
from pipelines.arguments import starting_noise, step_count, whole
from pipelines.codes import Attribute, Codes, fit_attribute
from pipelines.device import exact_float32
from pipelines.folder import Model
from pipelines.image import image_batch, rgb
from pipelines.opened import OpenedModel
from pipelines.picture import to_pil

ORDERS = {"ddim": 1, "heun": 2}  # the deterministic samplers, and the order of the inversion that each undoes
BATCH = 32  # pictures encoded or decoded at once: the memory of any number


class DiffusionAutoencoderPipeline(OpenedModel):
    """A diffusion autoencoder, and what can be done with pictures through their codes.

    Pictures go in as PIL pictures, one or a list, or as [N, 3, H, W] or [N, H, W, 3] in [0, 1]; they are brought to the
    size that the model was trained on, the middle square of PIL pictures. They come out as PIL pictures. Picture i of a
    call gets the noise of seed + i. `steps` and `sampler` ("ddim", or "heun", two evaluations a step) are by default
    the model's; the same are wanted for encoding and decoding. However many the pictures, 32 are in work at once.
    """

    def __init__(self, model: Model, source: str = ""):
        if not isinstance(model.conditioner, SemanticEncoder):
            raise ValueError(
                f"this model is told {type(model.conditioner).__name__}, not pictures: open it with "
                "TextToImagePipeline, or train a diffusion autoencoder with train/diffae.py"
            )
        assert isinstance(model.unet, UNet)  # what is told a code attends to it
        super().__init__(model, source)
        self.unet, self.encoder = model.unet, model.conditioner

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path | None = None, *, dtype: torch.dtype | str | None = None, **opened: Any
    ) -> Self:
        """Opens a model folder, a training run's folder or a hub id.

        dtype: by default float32 on every device: an inversion is undone only as exactly as both ways are computed.
        opened: as of `OpenedModel.from_pretrained`.
        Raises ValueError where no model is there, or none that is told pictures.
        """
        if not opened.get("torch_dtype"):
            dtype = dtype or torch.float32
        return super().from_pretrained(path_or_hub_id, dtype=dtype, **opened)

    def levels(self, steps: int | None = None, sampler: str | None = None) -> tuple[Tensor, str]:
        """The noise levels from pure noise down to the picture, and the sampler; by default the model's own.

        Raises ValueError for a sampler that can't be inverted, or more steps than a clamped schedule has rows.
        """
        defaults = self.model.defaults
        name = sampler or defaults.sampler or "ddim"
        if name not in ORDERS:
            raise ValueError(f"sampler={name!r}: expected {' or '.join(ORDERS)}, which can be inverted")
        schedule = self.model.schedule
        # A ramp over a clamped sigma would spend its steps above anything that matters.
        spacing = "trailing" if schedule.clamped else "karras"
        return step_grid(schedule, step_count(steps, None, defaults.steps), spacing), name

    @torch.no_grad()
    @exact_float32()
    def semantic(self, images: Any) -> Tensor:
        """The semantic codes alone, [N, D]."""
        return torch.cat([self.encoder.encode(part) for part in self._images(images).split(BATCH)])

    @torch.no_grad()
    @exact_float32()
    def encode(self, images: Any, *, steps: int | None = None, sampler: str | None = None) -> Codes:
        """Both codes; the stochastic one, [N, C, h, w], is about unit normal."""
        sigmas, name = self.levels(steps, sampler)

        def encoded(pictures: Tensor) -> Codes:
            semantic = self.encoder.encode(pictures)
            latents = self.model.vae.encode(pictures.to(self.unet.dtype)).mean
            with self.unet.reuse_contexts():
                x = invert(self._denoise(semantic), latents, sigmas.flip(0), order=ORDERS[name])
            return Codes(semantic, x / float(1 + sigmas[0] ** 2) ** 0.5)

        parts = [encoded(pictures) for pictures in self._images(images).split(BATCH)]
        return Codes(*(torch.cat(part) for part in zip(*parts, strict=True)))

    @torch.no_grad()
    @exact_float32()
    def latents(self, codes: Codes, *, steps: int | None = None, sampler: str | None = None) -> Tensor:
        """The autoencoder's latents that codes stand for, [N, C, h, w]; pictures, where the model works on pixels."""
        if len(codes.semantic) != len(codes.stochastic):
            got = f"{len(codes.semantic)} semantic and {len(codes.stochastic)} stochastic codes"
            raise ValueError(f"expected one of each for a picture, got {got}")
        sigmas, name = self.levels(steps, sampler)
        latents = []
        for semantic, noise in zip(codes.semantic.split(BATCH), codes.stochastic.split(BATCH), strict=True):
            x = noise.to(self.device) * float(1 + sigmas[0] ** 2) ** 0.5
            with self.unet.reuse_contexts():
                latents.append(SAMPLERS[name].function(self._denoise(semantic.to(self.device)), x, sigmas))
        return torch.cat(latents)

    @torch.no_grad()
    @exact_float32()
    def decode(self, codes: Codes, *, steps: int | None = None, sampler: str | None = None) -> list[Image.Image]:
        """The pictures that codes stand for."""
        parts = self.latents(codes, steps=steps, sampler=sampler).split(BATCH)
        return [to_pil(pixels) for part in parts for pixels in self.model.vae.decode(part).cpu()]

    def vary(
        self,
        images: Any,
        count: int = 1,
        *,
        seed: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> list[Image.Image]:
        """`count` pictures that show the same as each of these, from other noise; those of one follow one another."""
        semantic = self.semantic(images).repeat_interleave(_positive(count), dim=0)
        return self.decode(Codes(semantic, self._noise(len(semantic), seed)[1]), steps=steps, sampler=sampler)

    def interpolate(
        self, first: Any, second: Any, count: int = 5, *, steps: int | None = None, sampler: str | None = None
    ) -> list[Image.Image]:
        """`count` pictures on the way from one to another, both codes going along; the ends are reconstructions."""
        ends = [self.encode(image, steps=steps, sampler=sampler) for image in (first, second)]
        if any(len(end.semantic) != 1 for end in ends) or whole("count", count) < 2:
            got = " and ".join(str(len(end.semantic)) for end in ends)
            raise ValueError(f"expected one picture and another, and count of at least 2; got {got}, {count=}")
        between = [ends[0].toward(ends[1], i / (count - 1)) for i in range(count)]
        return self.decode(
            Codes(*(torch.cat(part) for part in zip(*between, strict=True))), steps=steps, sampler=sampler
        )

    def attribute(self, images: Any, labels: Sequence[bool] | Tensor, *, decay: float = 1.0) -> Attribute:
        """The plane between the semantic codes of pictures with something and without (`pipelines.codes`)."""
        return fit_attribute(self.semantic(images), labels, decay=decay)

    def manipulate(
        self, images: Any, attribute: Attribute, amount: float, *, steps: int | None = None, sampler: str | None = None
    ) -> list[Image.Image]:
        """The pictures with more of an attribute, or less, in standard deviations of the codes; their noise stays."""
        codes = self.encode(images, steps=steps, sampler=sampler)
        return self.decode(
            codes._replace(semantic=attribute.move(codes.semantic, amount)), steps=steps, sampler=sampler
        )

    @torch.no_grad()
    def sample(
        self, count: int = 1, *, seed: int | None = None, steps: int | None = None, sampler: str | None = None
    ) -> list[Image.Image]:
        """New pictures: semantic codes from their own diffusion, then pictures from noise.

        Raises ValueError when that diffusion is not trained yet.
        """
        if self.model.codes is None:
            raise ValueError("this model has no codes/, which training adds at its end: let train/diffae.py finish")
        draw, unit = self._noise(_positive(count), seed)
        semantic = self.model.codes.sample(draw(torch.empty(count, self.encoder.config.code_dim)).to(self.device))
        return self.decode(Codes(semantic, unit), steps=steps, sampler=sampler)

    def _images(self, images: Any) -> Tensor:
        """[N, 3, size, size] in [-1, 1]."""
        size = self.model.size
        several = list(images) if isinstance(images, list | tuple) else [images]
        if not several:
            raise ValueError("image: got an empty list, expected a picture, or a list of at least one")
        return torch.cat([_squares(one, size) for one in several]).to(self.device)

    def _denoise(self, semantic: Tensor) -> Denoise:
        context = self.encoder.context(semantic)
        return lambda x, sigma: self.model.denoiser(x, sigma, context)

    def _noise(self, count: int, seed: int | None) -> tuple[Any, Tensor]:
        """(the noise that follows from the same generators, stochastic codes [count, C, h, w])."""
        vae = self.model.vae
        side = self.model.size // vae.downscale
        _, draw, unit = starting_noise((count, vae.latent_channels, side, side), seed, None, None)
        return draw, unit


def _squares(image: Any, size: int) -> Tensor:
    """One picture, or an array of them, as [N, 3, size, size] in [-1, 1]."""
    if isinstance(image, Image.Image) and image.size != (size, size):
        image = ImageOps.fit(rgb(image), (size, size), Image.Resampling.LANCZOS)
    count = len(image) if getattr(image, "ndim", 3) == 4 else 1
    return image_batch(image, count, 1, size, size, 1)


def _positive(count: int) -> int:
    if whole("count", count) < 1:
        raise ValueError(f"count={count}: expected at least 1")
    return count
