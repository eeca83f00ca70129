"""From a prompt to pictures: `TextToImagePipeline.from_pretrained()("an oil painting of a fox").images[0]`."""

import functools
import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from conditioning.clip import ClipTextEncoder
from conditioning.context import Context
from ldm.guidance import classifier_free
from ldm.samplers import SAMPLERS, Grid, Noise, picture_noise
from ldm.schedule import step_grid
from pipelines.folder import Model, for_atelier_alone, load_model, save_model
from pipelines.picture import Picture

Callback = Callable[[int, float, Tensor, Tensor], None]  # step, sigma, x at sigma, estimate of x_0
Generators = torch.Generator | Sequence[torch.Generator]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# The sampler that a folder's scheduler stands for; any other class gets the default.
SCHEDULER_SAMPLERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "Atelier": "heun",
}


@dataclass
class Output:
    """What a call returns. images: PIL pictures, or an array or tensor, as `output_type` says."""

    images: Any
    seeds: list[int] | None  # one for each picture; None when generators or latents were given
    nsfw_content_detected: None = None  # for callers written for diffusers: there is no safety checker


class TextToImagePipeline:
    """A latent diffusion model and the way from prompts to pictures.

    Attributes:
        model: the networks, the conditioner, the schedule and the model's defaults (`pipelines.folder.Model`).
    """

    def __init__(self, model: Model):
        self.model = model
        self.progress = True

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | None = None,
        safety_checker: None = None,
        requires_safety_checker: bool = False,
    ) -> Self:
        """Opens a model folder, a training run's folder or a hub id; the bundled model when nothing is given.

        Args:
            device: by default cuda, else mps, else cpu.
            dtype: of the weights; by default bfloat16 on a CUDA GPU that has it, else float32.
            revision: branch or commit of a hub id.
            torch_dtype, safety_checker, requires_safety_checker: as in diffusers; there is no safety checker.

        Raises:
            ValueError: no model there, or one that is broken or not implemented.
        """
        if safety_checker is not None or requires_safety_checker:
            raise ValueError("there is no safety checker in Atelier: leave it out or pass safety_checker=None")
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype} are two names of one thing: give one")
        chosen = usable_device(device or best_device())
        bf16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported()
        wanted = dtype or torch_dtype or (torch.bfloat16 if bf16 else torch.float32)
        pipe = cls(load_model(path_or_hub_id, dtype=wanted, revision=revision))
        return pipe.to(chosen)

    @property
    def device(self) -> torch.device:
        return next(self.model.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.unet.parameters()).dtype

    def to(self, device: str | torch.device | torch.dtype, dtype: torch.dtype | None = None) -> Self:
        """Moves the networks to a device, or to a data type, or both; returns the pipeline."""
        target = self.device if isinstance(device, torch.dtype) else usable_device(device)
        dtype = device if isinstance(device, torch.dtype) else dtype
        for part in self.model.parts():
            part.to(target, dtype)
        # Convolutions are faster this way on every device that we measured (benchmarks/README.md).
        self.model.unet.to(memory_format=torch.channels_last)
        self.model.vae.to(memory_format=torch.channels_last)
        return self

    def set_progress_bar_config(self, disable: bool = False) -> None:
        """Shows or hides the progress bar (diffusers' name)."""
        self.progress = not disable

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes a diffusers folder, which `StableDiffusionPipeline.from_pretrained` opens and paints the same from.

        Raises ValueError for a model that such a folder cannot describe (a flow, EDM, labels), before writing.
        """
        if reason := for_atelier_alone(self.model):
            raise ValueError(f"this model can't be saved for diffusers: {reason}; training runs keep it as it is")
        save_model(self.model, Path(folder), dtype)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        *,
        seed: int | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        clip_skip: int | None = None,
        callback: Callback | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        num_inference_steps: int | None = None,
    ) -> Any:
        """Paints pictures.

        Args:
            prompt: one, or a list, which gives a batch; class names for a model of labels.
            height, width: in pixels, multiples of the autoencoder's factor; by default the model's own.
            steps: of the sampler (diffusers: `num_inference_steps`).
            guidance_scale: of classifier-free guidance, w + 1 in arXiv:2207.12598; 1 or less is none, as in diffusers.
            negative_prompt: what to steer away from, one or as many as prompts; by default the empty caption.
            num_images_per_prompt: pictures for each prompt.
            seed: picture i of the call gets the noise of seed + i, alone or in a batch; random by default.
            generator: instead of a seed, as in diffusers: one for the whole batch, or one for each picture.
            latents: the starting noise, unit normal, [pictures, channels, height / factor, width / factor].
            sampler: one of `ldm.samplers.SAMPLERS`; by default the model's.
            spacing: of the steps: leading, trailing, linspace, karras or exponential; by default the model's.
            eta: of "ddim": 0 is deterministic, 1 ancestral.
            guidance_rescale: 0 to 1 (arXiv:2305.08891, section 3.4).
            guidance_interval: (low, high) noise levels between which to guide (arXiv:2404.07724).
            clip_skip: layers of the text encoder to leave out at the end.
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
        prompts = _prompts(prompt)
        if steps is not None and num_inference_steps is not None and steps != num_inference_steps:
            raise ValueError(f"steps={steps} and {num_inference_steps=} are two names of one thing: give one")
        steps = next((s for s in (steps, num_inference_steps) if s is not None), defaults.steps)
        if steps < 1:
            raise ValueError(f"steps={steps}: sampling takes at least one step")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}: expected at least 1")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        height, width = self._sides(height, width)
        name = sampler or defaults.sampler or SCHEDULER_SAMPLERS.get(model.scheduler["_class_name"], "dpmpp_2m")
        if name not in SAMPLERS:
            raise ValueError(f"sampler={name!r}: expected one of {', '.join(SAMPLERS)}")
        if eta and name != "ddim":
            raise ValueError(f"eta={eta} belongs to sampler='ddim', not to {name!r}")
        grid = self._grid(name, spacing)
        sigmas = step_grid(model.schedule, steps, grid)
        scale = max(1.0, defaults.guidance_scale if guidance_scale is None else guidance_scale)
        interval = guidance_interval or defaults.guidance_interval
        if scale > 1 and defaults.caption_dropout == 0:
            warnings.warn(
                f"this model was trained without caption dropout, so guidance_scale={scale} has nothing true to guide "
                "away from: take guidance_scale=1, or train with --caption-dropout 0.1",
                stacklevel=2,
            )

        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        negatives = _negatives(negative_prompt, len(prompts), num_images_per_prompt)
        shape = (len(prompts), model.vae.latent_channels, height // model.vae.downscale, width // model.vae.downscale)
        seeds, noise, unit = _noise(shape, seed, generator, latents)
        unit = unit.to(self.device, torch.float32)

        cond, uncond = self._contexts(prompts, negatives, clip_skip)
        denoise = classifier_free(
            model.denoiser, cond, uncond, scale, rescale=guidance_rescale, interval=interval
        )  # fmt: skip
        chosen = SAMPLERS[name]
        x = unit * chosen.initial_scale(grid, float(sigmas[0]))
        with tqdm(total=steps, unit="step", leave=False, disable=not self.progress) as bar:

            def stepped(i: int, sigma: float, x: Tensor, x0: Tensor) -> None:
                bar.update()
                if callback:
                    callback(i, sigma, x, x0)

            options: dict[str, Any] = {"eta": eta} if name == "ddim" else {}
            with model.unet.reuse_contexts():
                x = chosen.function(denoise, x, sigmas, noise=noise, callback=stepped, **options)
        if output_type == "latent":
            return Output(x, seeds) if return_dict else (x, None)
        pixels = (model.vae.decode(x).float().clamp(-1, 1) + 1) / 2
        images: Any = pixels.cpu()
        if output_type == "np":
            images = images.permute(0, 2, 3, 1).numpy()
        elif output_type == "pil":
            settings = {"steps": steps, "guidance_scale": scale, "sampler": name, "spacing": grid.spacing}
            settings |= {"width": width, "height": height}
            images = [
                Picture.of(_to_pil(image), {"prompt": p, "negative_prompt": n, "seed": s, **settings})
                for image, p, n, s in zip(images, prompts, negatives, seeds or itertools.repeat(None), strict=False)
            ]
        return Output(images, seeds) if return_dict else (images, None)

    def _sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        factor = self.model.vae.downscale
        sides = (height or self.model.size, width or self.model.size)
        if any(side < factor or side % factor for side in sides):
            near = " × ".join(str(max(factor, round(side / factor) * factor)) for side in sides)
            raise ValueError(
                f"height × width = {sides[0]} × {sides[1]}: expected multiples of {factor}, such as {near}"
            )
        return sides

    def _grid(self, sampler: str, spacing: str | None) -> Grid:
        """The sampler's steps as diffusers' scheduler of its name would space them, given this folder's config."""
        config = self.model.scheduler
        final = config.get("final_sigmas_type") if sampler == "dpmpp_2m" else None
        if sampler == "ddim" and "set_alpha_to_one" in config:
            final = "zero" if config["set_alpha_to_one"] else "sigma_min"
        ramps = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential"}
        ramp = next((r for key, r in ramps.items() if config.get(key) and sampler not in ("ddim", "ddpm")), None)
        return SAMPLERS[sampler].grid_for(
            self.model.schedule,
            spacing=spacing or config.get("timestep_spacing"),
            offset=config.get("steps_offset"),
            final=final,
            ramp=None if spacing else ramp,
        )

    def _contexts(self, prompts: list[str], negatives: list[str], clip_skip: int | None) -> tuple[Context, Context]:
        conditioner = self.model.conditioner
        if not isinstance(conditioner, ClipTextEncoder):
            if clip_skip:
                raise ValueError("clip_skip belongs to a model with a CLIP text encoder")
            return conditioner(prompts), conditioner(negatives)
        kept, conditioner.clip_skip = conditioner.clip_skip, clip_skip or conditioner.clip_skip
        try:
            # Both in as many windows as the longest needs, and every distinct text once.
            texts = list(dict.fromkeys(prompts + negatives))
            hidden = conditioner(texts, chunks=conditioner.chunks(texts))["encoder_hidden_states"]
        finally:
            conditioner.clip_skip = kept
        row = {text: i for i, text in enumerate(texts)}
        cond, uncond = (hidden[[row[t] for t in group]] for group in (prompts, negatives))
        return {"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond}


def best_device() -> str:
    """cuda where there is one, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name; ValueError when there is none, or none on this machine."""
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} can't be used here ({why}): expected cpu, cuda or mps") from None
    return chosen


def _prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("prompt is an empty list: expected a text, or a list of at least one")
    for p in prompts:
        if not isinstance(p, str):
            raise ValueError(f"prompt should be a text or a list of texts, got {p!r}")
    return prompts


def _negatives(negative: str | Sequence[str] | None, pictures: int, per_prompt: int) -> list[str]:
    if negative is None or isinstance(negative, str):
        return [negative or ""] * pictures
    negatives = [n for n in _prompts(negative) for _ in range(per_prompt)]
    if len(negatives) != pictures:
        raise ValueError(f"{len(negative)} negative prompts for {pictures // per_prompt} prompts: give one, or as many")
    return negatives


def _noise(
    shape: tuple[int, ...], seed: int | None, generator: Generators | None, latents: Tensor | None
) -> tuple[list[int] | None, Callable[[Tensor], Tensor], Tensor]:
    """(seeds, the sampler's noise, starting latents [*shape], unit normal)."""
    if seed is not None and generator is not None:
        raise ValueError("seed and generator both say where noise comes from: give one")
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"latents should be of shape {shape}, got {tuple(latents.shape)}")
    seeds = None
    if isinstance(generator, torch.Generator):
        noise: Noise = functools.partial(_batch_noise, generator)
        return None, noise, noise(torch.empty(shape)) if latents is None else latents
    if generator is None:
        first = random.randrange(2**31) if seed is None else seed
        seeds = list(range(first, first + shape[0]))
        generator = [torch.Generator().manual_seed(s) for s in seeds]
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} pictures: give one, or as many")
    noise = picture_noise(list(generator))
    return seeds, noise, noise(torch.empty(shape)) if latents is None else latents


def _batch_noise(generator: torch.Generator, x: Tensor) -> Tensor:
    """The whole batch from one generator, as diffusers draws it."""
    return torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)


def _to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> PIL."""
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
