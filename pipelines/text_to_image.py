"""From a prompt to pictures: `TextToImagePipeline.from_pretrained()("an oil painting of a fox").images[0]`."""

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from conditioning.pair import with_sizes
from ldm.classifier import NoisyClassifier
from ldm.guidance import classifier_free
from ldm.samplers import SAMPLERS
from ldm.schedule import step_grid
from ldm.steps import Callback
from ldm.unet import UNet
from pipelines.arguments import (
    Generators,
    check_sampler,
    checked_sides,
    first_step,
    negative_list,
    number,
    prompt_list,
    starting_noise,
    step_count,
    told_sizes,
    whole,
)
from pipelines.classifier import guided_to
from pipelines.defaults import is_interval
from pipelines.image import image_batch
from pipelines.inpainting import begin, check_mask, mask_batch
from pipelines.opened import OpenedModel
from pipelines.picture import as_numbers, painted
from pipelines.prompts import contexts
from pipelines.scheduler import grid_of, sampler_of, sampler_options

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class Output:
    """What a call returns. images: PIL pictures, or an array or tensor, as `output_type` says."""

    images: Any
    seeds: list[int] | None  # one for each picture; None when generators or latents were given
    nsfw_content_detected: None = None  # for callers written for diffusers: there is no safety checker


class TextToImagePipeline(OpenedModel):
    """A latent diffusion model and the way from prompts to pictures.

    Attributes:
        model: the networks, the conditioner, the schedule and the model's defaults (`pipelines.folder.Model`).
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: Any = None,
        mask: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        classifier: NoisyClassifier | str | Path | None = None,
        classifier_scale: float = 1.0,
        variance: Literal["small", "large"] | None = None,
        clip_skip: int | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        callback: Callback | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        num_inference_steps: int | None = None,
    ) -> Any:
        """Paints pictures.

        Args:
            prompt: one, or a list, which gives a batch; class names for a model of labels.
            image: picture, or one for each prompt, to begin from (`pipelines.image`): it is noised to the level of
                `strength` and denoised from there (SDEdit, arXiv:2108.01073).
            mask: of `image`: white where to paint, black where it stays (`pipelines.inpainting`).
            strength: share of the steps that are run on `image`, as in diffusers: 1 forgets most of it. By default 0.8,
                with a mask 1, which begins from noise alone.
            height, width: in pixels, multiples of the autoencoder's factor; by default the model's own, or `image`'s.
            steps: of the sampler (diffusers: `num_inference_steps`).
            guidance_scale: of classifier-free guidance, w + 1 in arXiv:2207.12598; 1 or less is none, as in diffusers.
            negative_prompt: what to steer away from, one or as many as prompts; by default the null, which is the empty
                caption, or what SDXL's kind of model has in its place.
            num_images_per_prompt: pictures for each prompt.
            seed: picture i of the call gets the noise of seed + i, alone or in a batch; random by default.
            generator: instead of a seed, as in diffusers: one for the whole batch, or one for each picture.
            latents: the starting noise, unit normal, [pictures, channels, height / factor, width / factor].
            sampler: one of `ldm.samplers.SAMPLERS`; by default the model's.
            spacing: of the steps: leading, trailing, linspace, karras or exponential; by default the model's.
            eta: of "ddim": 0 is deterministic, 1 ancestral.
            guidance_rescale: 0 to 1 (arXiv:2305.08891, section 3.4).
            guidance_interval: (low, high) noise levels between which to guide (arXiv:2404.07724); by default the
                model's, if it has one, which (0, math.inf) switches off.
            classifier: of noisy pictures, or its folder (train/classifier.py): guides to the classes that the prompts
                name (arXiv:2105.05233), a model that is told nothing or any other.
            classifier_scale: of its gradient: 1 is the classes' own distribution, more the surer. `ddpm`, the paper's
                sampler, followed it better than `dpmpp_2m` did (examples/classifier_guidance.py).
            variance: of the steps of the sampler "ddpm" (arXiv:2006.11239, section 3.2); by default the model's, which
                may be learned, else the small one.
            clip_skip: layers of the text encoder to leave out at the end.
            original_size, crop, target_size: what SDXL's kind of model is told of a picture, (height, width), (top,
                left) and (height, width) in pixels (arXiv:2307.01952, section 2.2; diffusers: `original_size`,
                `crops_coords_top_left`, `target_size`); by default the picture's own size, uncropped.
            callback: called at every step with (step, sigma, x at sigma, estimate of x_0), all in latents.
            output_type: "pil", "np" [N, H, W, 3] in [0, 1], "pt" [N, 3, H, W] in [0, 1], or "latent", which are as
                diffusers has them.
            return_dict: False gives a tuple, as in diffusers.

        Returns:
            `Output`; PIL pictures carry prompt, seed and settings into the PNG that `.save` writes.

        Raises:
            ValueError: an argument that makes no sense, with what was expected.
        """
        model, defaults = self.model, self.model.defaults
        prompts = prompt_list(prompt)
        height, width = (s if s is None else whole(n, s) for n, s in (("height", height), ("width", width)))
        steps = step_count(steps, num_inference_steps, defaults.steps)
        clip_skip = clip_skip if clip_skip is None else whole("clip_skip", clip_skip)
        num_images_per_prompt = whole("num_images_per_prompt", num_images_per_prompt)
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}: expected at least 1")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        name = sampler or defaults.sampler or sampler_of(model.scheduler)
        check_sampler(name, eta, variance)
        if classifier is None and classifier_scale != 1:
            raise ValueError(f"classifier_scale={classifier_scale} belongs to a classifier, and none was given")
        grid = grid_of(model.scheduler, model.schedule, name, spacing, model.steps_offset)
        sigmas = step_grid(model.schedule, steps, grid)
        asked = bool(guidance_rescale or (negative_prompt and any(prompt_list(negative_prompt, "negative_prompt"))))
        scale, interval = self._guidance(guidance_scale, guidance_interval, asked)

        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        negatives = negative_list(negative_prompt, len(prompts), num_images_per_prompt)
        factor = model.vae.downscale
        if image is None and strength is not None:
            raise ValueError(f"strength={strength} is of an `image` to begin from, and none was given")
        strength = strength if strength is not None else 0.8 if mask is None else 1.0
        check_mask(model, image, mask)
        if image is not None:
            sigmas = sigmas[first_step(strength, steps) :]
            image = image_batch(image, len(prompts), num_images_per_prompt, height, width, factor)
            height, width = image.shape[2:]
        if mask is not None:
            mask = mask_batch(mask, len(prompts), num_images_per_prompt, *image.shape[2:])
        height, width = checked_sides(height, width, model.sides, factor)
        shape = (len(prompts), model.vae.latent_channels, height // factor, width // factor)
        seeds, noise, unit = starting_noise(shape, seed, generator, latents)
        unit = unit.to(self.device, torch.float32)

        chosen, draw = SAMPLERS[name], noise if latents is None else None
        first = float(sigmas[0])
        start = begin(model, image, mask, strength, unit, draw, first, chosen.initial_scale(grid, first))
        sizes = told_sizes(model.xl, height, width, original_size, crop, target_size)
        told = contexts(model.conditioner, prompts, None if negative_prompt is None else negatives, clip_skip)
        numbers = [n for pair in sizes.values() for n in pair]
        cond, uncond = (with_sizes(context, [numbers] * len(prompts)) for context in told)
        if start.beside is not None:
            cond, uncond = cond | {"concat": start.beside}, uncond | {"concat": start.beside}
        denoise = classifier_free(model.denoiser, cond, uncond, scale, rescale=guidance_rescale, interval=interval)
        if classifier is not None:
            denoise = guided_to(denoise, classifier, prompts, classifier_scale, unit)
        fixed = {"variance": variance} if variance else {}
        denoise = start.hold(denoise)
        with tqdm(total=len(sigmas) - 1, unit="step", leave=False, disable=not self.progress) as bar:

            def stepped(i: int, sigma: float, x: Tensor, x0: Tensor) -> None:
                bar.update()
                if callback:
                    callback(i, sigma, x, x0)

            reuse = model.unet.reuse_contexts() if isinstance(model.unet, UNet) else nullcontext()
            put_out = model.denoiser.learned_variance() if model.learned_variance else nullcontext()
            with reuse, put_out as learned:
                options = sampler_options(model.scheduler, name, eta, learned) | fixed
                x = chosen.function(denoise, start.x, sigmas, noise=noise, callback=stepped, **options)
        x = start.finish(x)
        images: Any
        if output_type != "pil":
            images = x if output_type == "latent" else as_numbers(model.vae.decode(x), output_type)
        else:
            settings: dict[str, Any] = {"model": self.source, "dtype": str(self.dtype).removeprefix("torch.")}
            settings |= {"steps": steps, "sampler": name, "spacing": grid.spacing, "eta": eta}
            settings |= {"guidance_scale": scale, "guidance_rescale": guidance_rescale, **fixed}
            finite = interval and [min(max(level, -1e9), 1e9) for level in interval]  # JSON has no infinity
            settings["guidance_interval"] = finite
            skipped = getattr(model.conditioner, "clip_skip", 0) if clip_skip is None else clip_skip
            settings |= {"clip_skip": skipped, "width": width, "height": height, **sizes}
            if image is not None:
                settings |= {"strength": strength, "mask": mask is not None}
            if self.loras or self._embeddings:
                settings |= {"loras": self.loras, "embeddings": list(self._embeddings)}
            if classifier is not None:
                named = {} if isinstance(classifier, NoisyClassifier) else {"classifier": str(classifier)}
                settings |= named | {"classifier_scale": classifier_scale}
            images = painted(model.vae.decode(x), prompts, negatives, seeds, settings)
        return Output(images, seeds) if return_dict else (images, None)

    def _guidance(
        self, scale: float | None, interval: tuple[float, float] | None, asked: bool
    ) -> tuple[float, tuple[float, float] | None]:
        """(scale, interval) of a call, by default the model's; None guides everywhere.

        Raises ValueError for a call without guidance that `asked` for a part of it.
        """
        model, defaults = self.model, self.model.defaults
        if interval is not None and not is_interval(interval):
            raise ValueError(f"guidance_interval={interval!r}: expected two noise levels, (low, high)")
        scale = defaults.guidance_scale if scale is None else number("guidance_scale", scale, "1 for no guidance")
        scale = max(1.0, scale)
        if not model.is_told:
            scale = 1.0  # there is nothing to guide away from
        if scale == 1 and asked:
            raise ValueError(
                "negative_prompt and guidance_rescale belong to guidance, and this call has none: give guidance_scale "
                "above 1, to a model that is told something"
            )
        if scale > 1 and defaults.caption_dropout == 0:
            warnings.warn(
                f"this model was trained without caption dropout, so guidance_scale={scale} has nothing true to guide "
                "away from: take guidance_scale=1, or train with --caption-dropout 0.1",
                stacklevel=4,  # the caller, behind torch.no_grad
            )
        interval = defaults.guidance_interval if interval is None else interval
        return scale, None if interval and interval[0] <= 0 and interval[1] == math.inf else interval
