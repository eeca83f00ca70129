"""The arguments of a call, checked: prompts, sides, and where the noise comes from."""

import functools
import math
import operator
import random
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ldm.samplers import SAMPLERS, Noise, picture_noise

Generators = torch.Generator | Sequence[torch.Generator]


def whole(name: str, value: Any) -> int:
    """Python's own int of a whole number of any kind; ValueError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: expected a whole number") from None


def number(name: str, value: Any, expected: str) -> float:
    """Python's own float of a finite number of any kind; ValueError for anything else."""
    try:
        found = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{name}={value!r}: expected a number, {expected}")
    return found


def prompt_list(prompt: Any, name: str = "prompt") -> list[str]:
    """One text or several as a list; ValueError for anything else."""
    if not isinstance(prompt, str | list | tuple):
        raise ValueError(f"{name} should be a text or a list of texts, got {prompt!r}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError(f"{name} is an empty list: expected a text, or a list of at least one")
    for p in prompts:
        if not isinstance(p, str):
            raise ValueError(f"{name} should be a text or a list of texts, got {p!r} in the list")
    return prompts


def negative_list(negative: Any, pictures: int, per_prompt: int) -> list[str]:
    """A negative prompt for each picture; by default the empty one."""
    if negative is None or isinstance(negative, str):
        return [negative or ""] * pictures
    negatives = [n for n in prompt_list(negative, "negative_prompt") for _ in range(per_prompt)]
    if len(negative) == 1:
        return list(negative) * pictures
    if len(negatives) != pictures:
        raise ValueError(f"{len(negative)} negative prompts for {pictures // per_prompt} prompts: give one, or as many")
    return negatives


def step_count(steps: int | None, num_inference_steps: int | None, default: int) -> int:
    """The number of steps, which has two names."""
    if steps is not None and num_inference_steps is not None and steps != num_inference_steps:
        raise ValueError(f"steps={steps} and {num_inference_steps=} are two names of one thing: give one")
    steps = whole("steps", next((s for s in (steps, num_inference_steps) if s is not None), default))
    if steps < 1:
        raise ValueError(f"steps={steps}: sampling takes at least one step")
    return steps


def check_sampler(name: str, eta: float, variance: str | None) -> None:
    """ValueError for a name that is no sampler's, or for what belongs to another."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r}: expected one of {', '.join(SAMPLERS)}")
    if eta and name != "ddim":
        raise ValueError(f"eta={eta} belongs to sampler='ddim', not to {name!r}")
    if variance and (name != "ddpm" or variance not in ("small", "large")):
        raise ValueError(f"variance={variance!r} with sampler {name}: expected small or large, with sampler='ddpm'")


def first_step(strength: float, steps: int) -> int:
    """How many first steps are skipped when sampling starts from a picture (diffusers' img2img)."""
    run = min(int(steps * strength), steps) if isinstance(strength, Real) and 0 < strength <= 1 else 0
    if run < 1:
        raise ValueError(f"strength={strength} of {steps} steps: expected above 0, at most 1, and at least one step")
    return steps - run


def checked_sides(height: int | None, width: int | None, default: tuple[int, int], factor: int) -> tuple[int, int]:
    """Height and width in pixels; ValueError unless multiples of the autoencoder's factor."""
    sides = (default[0] if height is None else height, default[1] if width is None else width)
    if any(side < factor or side % factor for side in sides):
        near = " × ".join(str(max(factor, round(side / factor) * factor)) for side in sides)
        raise ValueError(f"height × width = {sides[0]} × {sides[1]}: expected multiples of {factor}, such as {near}")
    return sides


def told_sizes(
    told: bool,
    height: int,
    width: int,
    original_size: Sequence[int] | None,
    crop: Sequence[int] | None,
    target_size: Sequence[int] | None,
) -> dict[str, list[int]]:
    """What a model is told of sizes, by the names of the arguments; nothing, where it isn't `told` of any.

    Raises ValueError for what is no pair of numbers, or is given to a model that is told none.
    """
    given = {"original_size": original_size, "crop": crop, "target_size": target_size}
    for name, pair in given.items():
        if pair is not None and not told:
            raise ValueError(f"{name}={pair!r} belongs to SDXL's kind of model, and this one is told no sizes")
        listed = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(n, int) for n in pair)
        if pair is not None and not listed:
            what = "(top, left)" if name == "crop" else "(height, width)"
            raise ValueError(f"{name}={pair!r}: expected {what}, two whole numbers of pixels")
    default = {"original_size": (height, width), "crop": (0, 0), "target_size": (height, width)}
    return {name: list(given[name] or default[name]) for name in default} if told else {}


def starting_noise(
    shape: tuple[int, ...], seed: int | None, generator: Generators | None, latents: Tensor | None
) -> tuple[list[int] | None, Noise, Tensor]:
    """(seeds, the sampler's noise, starting latents [*shape], unit normal).

    seeds: what each picture can be painted from again; None when generators or latents were given.
    """
    if seed is not None and generator is not None:
        raise ValueError("seed and generator both say where noise comes from: give one")
    if latents is not None and (not isinstance(latents, Tensor) or tuple(latents.shape) != shape):
        got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"latents should be a tensor of shape {shape}, got {got}")
    given = [] if generator is None else [generator] if isinstance(generator, torch.Generator) else generator
    if not isinstance(given, list | tuple) or not all(isinstance(one, torch.Generator) for one in given):
        raise ValueError(f"generator={generator!r}: expected a torch.Generator, or a list of one for each picture")
    seeds = None
    if isinstance(generator, torch.Generator):
        noise: Noise = functools.partial(_batch_noise, generator)
    else:
        if generator is None:
            first = random.randrange(2**31) if seed is None else _seed(seed, shape[0])
            seeds = list(range(first, first + shape[0]))
            generator = [torch.Generator().manual_seed(s) for s in seeds]
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} pictures: give one, or as many")
        noise = picture_noise(list(generator))
    return (seeds, noise, noise(torch.empty(shape))) if latents is None else (None, noise, latents)


def _seed(seed: Any, pictures: int) -> int:
    if isinstance(seed, list | tuple):
        raise ValueError(
            f"seed={seed!r}: expected one number, that of the first picture; for a seed of each give "
            "generator=[torch.Generator().manual_seed(s) for s in …]"
        )
    first = whole("seed", seed)
    if not -(2**63) <= first <= 2**64 - pictures:
        raise ValueError(f"seed={seed}: expected a number that has 64 bits, with those of the pictures after it")
    return first


def _batch_noise(generator: torch.Generator, x: Tensor) -> Tensor:
    """The whole batch from one generator, as diffusers draws it."""
    return torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)
