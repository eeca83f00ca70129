"""What a folder's scheduler config says about sampling: the sampler, its step grid, and what is not implemented."""

import warnings
from collections.abc import Mapping
from typing import Any

from ldm.samplers import SAMPLERS, LogVariance
from ldm.schedule import RAMPS, Grid, NoiseSchedule

# The sampler that a folder's scheduler stands for; any other class gets FALLBACK, and a warning.
SCHEDULER_SAMPLERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",  # dpmpp_2m_sde with its algorithm_type
    "UniPCMultistepScheduler": "unipc",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "plms",
    "Atelier": "heun",
}
FALLBACK = "dpmpp_2m"

# Values of a diffusers scheduler config that change the picture: those implemented here, and what is done for others.
_ANY = {
    "thresholding": ((False,), "estimates are not thresholded"),
    "clip_sample": ((False,), "estimates are not clipped, as in diffusers' StableDiffusionPipeline"),
    "steps_offset": ((1,), "1 is taken, as in diffusers' StableDiffusionPipeline"),
    "use_beta_sigmas": ((False, None), "steps are spaced by timestep_spacing"),
    "use_lu_lambdas": ((False, None), "steps are spaced by timestep_spacing"),
    "use_flow_sigmas": ((False, None), "steps are spaced by timestep_spacing"),
    "use_dynamic_shifting": ((False, None), "steps are not shifted"),
    "final_sigmas_type": (("zero", "sigma_min"), "the last step ends at zero"),
}
_OWN: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "DDPMScheduler": {
        "variance_type": (("fixed_small", "fixed_small_log", "fixed_large"), "the variance is fixed_small"),
    },
    "EulerDiscreteScheduler": {
        "interpolation_type": (("linear",), "levels between the table's rows are log-linear"),
        "timestep_type": (("discrete",), "the clock is discrete"),
        "sigma_min": ((None,), "the table's own is taken"),
        "sigma_max": ((None,), "the table's own is taken"),
    },
    "DPMSolverMultistepScheduler": {
        "algorithm_type": (("dpmsolver++", "sde-dpmsolver++"), "dpmsolver++ is taken"),
        "solver_order": ((2,), "order 2 is taken"),
        "solver_type": (("midpoint",), "midpoint is taken"),
        "lower_order_final": ((True,), "the last of fewer than 15 steps is of order 1"),
        "euler_at_final": ((False,), "the last step is of order 1 only when it ends at zero or steps are few"),
        "lambda_min_clipped": ((float("-inf"), "-Infinity", "-inf", None), "no level is clipped"),
        "variance_type": ((None,), "the network's variance is not used"),
    },
    "UniPCMultistepScheduler": {
        "solver_order": ((1, 2, 3), "order 2 is taken"),
        "solver_type": (("bh2",), "bh2 is taken"),
        "predict_x0": ((True,), "estimates of x_0 are extrapolated"),
        "lower_order_final": ((True,), "the last steps are of lower order"),
        "disable_corrector": (([],), "every step is corrected"),
        "solver_p": ((None,), "the predictor is UniPC's own"),
        "sigma_min": ((None,), "the table's own is taken"),
        "sigma_max": ((None,), "the table's own is taken"),
    },
    "PNDMScheduler": {
        "skip_prk_steps": ((True,), "Runge-Kutta steps are skipped, and the first step is one of Heun's"),
        "prediction_type": (("epsilon",), "epsilon is extrapolated, as in the paper, not what the network puts out"),
    },
}
# Keys that, missing, mean to diffusers what is not implemented.
_MISSING: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "PNDMScheduler": {"skip_prk_steps": False},
}


def sampler_of(config: Mapping[str, Any]) -> str:
    """The sampler that stands for the scheduler of a config."""
    name = config.get("_class_name", "")
    if name == "DPMSolverMultistepScheduler" and config.get("algorithm_type") == "sde-dpmsolver++":
        return "dpmpp_2m_sde"
    return SCHEDULER_SAMPLERS.get(name, FALLBACK)


def warn_of_differences(config: Mapping[str, Any], learned_variance: bool = False, steps_offset: int = 1) -> None:
    """One warning that names whatever in a scheduler config is not implemented, and what is done in its place.

    learned_variance: the U-Net has the variance that "learned_range" asks for.
    steps_offset: what is taken.
    No error: the table of noise levels is the model's, but how to step through it is the caller's choice.
    """
    name = config.get("_class_name", "")
    found = []
    if name not in SCHEDULER_SAMPLERS:
        found.append(f"_class_name={name!r}: the sampler is {FALLBACK}")
    known = _ANY | _OWN.get(name, {})
    for key, (implemented, instead) in known.items():
        if (key == "variance_type" and learned_variance) or (key == "steps_offset" and config.get(key) == steps_offset):
            continue
        if key in config and config[key] not in implemented:
            found.append(f"{key}={config[key]!r}: {instead}")
    for key, meaning in _MISSING.get(name, {}).items():
        if key not in config:
            found.append(f"{key} is missing, which is {meaning} to diffusers: {known[key][1]}")
    if found:
        warnings.warn(f"not implemented in the model's scheduler config: {'; '.join(found)}", stacklevel=3)


def grid_of(
    config: Mapping[str, Any], schedule: NoiseSchedule, sampler: str, spacing: str | None = None, offset: int = 1
) -> Grid:
    """A sampler's steps as diffusers' scheduler of its name would space them, given this config.

    offset: of leading steps (`pipelines.folder.Model.steps_offset`); StableDiffusionPipeline sets 1 whatever it says.
    """
    own_ramp = SAMPLERS[sampler].grid.spacing in RAMPS  # no scheduler of diffusers: its grid stays as it is
    final = config.get("final_sigmas_type") if sampler in ("dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler") else None
    if sampler in ("ddim", "plms") and "set_alpha_to_one" in config:
        final = "zero" if config["set_alpha_to_one"] else "sigma_min"
    ramps = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential"}
    rampless = own_ramp or sampler in ("ddim", "ddpm", "plms")
    ramp = next((r for key, r in ramps.items() if config.get(key) and not rampless), None)
    return SAMPLERS[sampler].grid_for(
        schedule,
        spacing=spacing or (None if own_ramp else config.get("timestep_spacing")),
        offset=None if "path" in config else offset,
        final=final if final in ("zero", "sigma_min") else None,
        ramp=None if spacing else ramp,
    )


def sampler_options(
    config: Mapping[str, Any], sampler: str, eta: float, learned: LogVariance | None = None
) -> dict[str, Any]:
    """What a sampler takes beside the grid. learned: the network's variance, if it has one.

    With "fixed_large" and "learned_range" diffusers adds noise after the last of fewer than 1000 steps; algorithm 2 of
    DDPM, and we, don't.
    """
    if sampler == "ddim":
        return {"eta": eta}
    if sampler == "ddpm" and config.get("variance_type") == "fixed_large":
        return {"variance": "large"}
    if sampler == "ddpm" and learned is not None:
        return {"variance": learned}
    if sampler == "unipc" and config.get("_class_name") == "UniPCMultistepScheduler":
        order = config.get("solver_order")
        return {"order": order} if order in (1, 2, 3) else {}
    return {}
