"""A model as a folder: the layouts of StableDiffusionPipeline and StableDiffusionXLPipeline, and atelier.json for what
they have no field for.

This module and `pipelines.conditioners` alone know checkpoint layouts. A model whose path, prediction or conditioning
the layout can't say is saved without model_index.json, for Atelier alone; `for_atelier_alone` says why.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conditioning.clip import ClipTextEncoder
from conditioning.context import Unconditional
from conditioning.pair import ClipTextPair
from ldm.blocks import DIFFUSERS_VERSION
from ldm.denoiser import Denoiser
from ldm.pixel_unet import PixelUNet
from ldm.schedule import EDM, NoiseSchedule, RectifiedFlow, VariancePreserving
from ldm.unet import UNet, UNetConfig
from pipelines.codes import CodeDiffusion
from pipelines.conditioners import NOTES, Conditioning, check_saved, components, load_conditioner, save_conditioner
from pipelines.defaults import Defaults, read_defaults
from pipelines.files import blaming, load_autoencoder, open_network, read_json, save_network, write_json
from pipelines.find import find_model
from pipelines.scheduler import warn_of_differences
from vae.autoencoder import Autoencoder, Identity

# With one text encoder, and with two; the second of each: a U-Net that inpaints.
KINDS = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
XL_KINDS = ("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline")
BETAS: dict[str, Any] = {
    "linear": VariancePreserving.linear,
    "scaled_linear": VariancePreserving.scaled_linear,
    "squaredcos_cap_v2": VariancePreserving.cosine,
}
PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v", "mean": "mean"}  # ours: the last


@dataclass
class Model:
    """The parts of a latent diffusion model. `scheduler` is the config that says path, prediction and step spacing;
    `codes` the second diffusion of a diffusion autoencoder, once it is trained."""

    unet: UNet | PixelUNet
    vae: Autoencoder | Identity
    conditioner: Conditioning
    scheduler: dict[str, Any]
    defaults: Defaults = field(default_factory=Defaults)
    codes: CodeDiffusion | None = None
    loras: Any = field(default=None, repr=False, compare=False)  # `pipelines.loras.Loras`: what is merged into it

    def __post_init__(self) -> None:
        self.schedule, self.prediction = schedule_from(self.scheduler)
        self.denoiser = Denoiser(self.unet, self.schedule, self.prediction, self.scheduler.get("sigma_data", 1.0))
        if isinstance(self.vae, Autoencoder) and (self.vae.config.in_channels, self.vae.config.out_channels) != (3, 3):
            raise ValueError(
                f"the autoencoder takes {self.vae.config.in_channels} and puts out {self.vae.config.out_channels} "
                "channels of a picture: expected 3 and 3, red, green and blue"
            )
        channels, outputs = self.vae.latent_channels, self.unet.config.out_channels
        if outputs not in (channels, 2 * channels):
            raise ValueError(
                f"the U-Net puts out {outputs} channels for latents of {channels}: expected {channels}, or "
                f"{2 * channels} with the variance"
            )
        inputs = self.unet.config.in_channels
        if inputs not in (channels, 2 * channels + 1):
            raise ValueError(
                f"the U-Net takes {inputs} channels for latents of {channels}: expected {channels}, or "
                f"{2 * channels + 1} with a mask and the masked picture"
            )
        self._check_told()
        if isinstance(self.conditioner, ClipTextPair):
            self.conditioner.size = self.size

    def _check_told(self) -> None:
        """Raises ValueError where U-Net and text encoders are not of one kind."""
        config, told = self.unet.config, self.conditioner
        wants = isinstance(config, UNetConfig) and config.addition_embed_type is not None
        if wants != isinstance(told, ClipTextPair):
            expected = "a ClipTextPair, SDXL's two text encoders" if wants else "one text encoder, or none"
            raise ValueError(
                f"a U-Net with addition_embed_type={'text_time' if wants else None} told by {type(told).__name__}: "
                f"expected {expected}"
            )
        if not isinstance(config, UNetConfig) or not isinstance(told, ClipTextPair):
            return
        states, summary = told.widths
        sizes, each = (config.projection_class_embeddings_input_dim or 0) - summary, config.addition_time_embed_dim or 1
        if config.cross_attention_dim != states or sizes != 6 * each:
            raise ValueError(
                f"the text encoders give {states} and {summary} numbers, the U-Net takes {config.cross_attention_dim} "
                f"and {summary} with {sizes / each:g} sizes: expected 6 (SDXL's refiner, which takes 5, is not "
                "implemented)"
            )

    @property
    def is_told(self) -> bool:
        """Whether the network is told anything: text, a label or a picture."""
        return not isinstance(self.conditioner, Unconditional)

    @property
    def xl(self) -> bool:
        """Of SDXL's kind: told by two text encoders, and of sizes."""
        return isinstance(self.conditioner, ClipTextPair)

    @property
    def steps_offset(self) -> int:
        """Rows added to leading steps: StableDiffusionPipeline makes it 1, SDXL's leaves it to the scheduler config."""
        return int(self.scheduler.get("steps_offset", 0)) if self.xl else 1

    def vae_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """The autoencoder's type in a model of `dtype`: SDXL's overflows in float16 where its config says so."""
        upcast = self.xl and isinstance(self.vae, Autoencoder) and self.vae.config.force_upcast
        return torch.float32 if upcast and dtype == torch.float16 else dtype

    @property
    def inpaints(self) -> bool:
        """The U-Net takes a mask and the masked picture's latents beside x."""
        return self.unet.config.in_channels > self.vae.latent_channels

    @property
    def learned_variance(self) -> bool:
        """The U-Net puts out the variance of a step, too."""
        doubled = self.unet.config.out_channels > self.vae.latent_channels
        return doubled and self.scheduler.get("variance_type") == "learned_range"

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the pictures it paints by default, in pixels."""
        latent = self.unet.config.sample_size or 64
        latents = (latent, latent) if isinstance(latent, int) else latent
        size = self.defaults.size
        return (size, size) if size else (latents[0] * self.vae.downscale, latents[1] * self.vae.downscale)

    @property
    def size(self) -> int:
        """Side of a square of about as many pixels: most models paint squares."""
        factor = self.vae.downscale
        return round(math.sqrt(math.prod(self.sides)) / factor) * factor

    def parts(self) -> tuple[nn.Module, ...]:
        return (self.unet, self.vae, self.conditioner, *([self.codes] if self.codes is not None else []))


def scheduler_config(
    path: str, prediction: str, *, sigma_data: float = 1.0, zero_snr: bool = False, learned_variance: bool = False
) -> dict[str, Any]:
    """The scheduler config of a new model.

    path: "scaled_linear" (Stable Diffusion), "linear", "cosine", "flow" or "edm". Beta tables become a complete
    DDIMScheduler config, because readers fill in what is missing each in their own way; where the variance is learned
    a DDPMScheduler's, which alone has a word for that.
    """
    if path in ("flow", "edm"):
        if zero_snr:
            raise ValueError(f"zero_snr rescales a table of betas, and path {path!r} has none: leave it out")
        if learned_variance:
            raise ValueError(f"a learned variance is of steps on a table of betas, and path {path!r} has none")
        return {"_class_name": "Atelier", "path": path, "prediction": prediction, "sigma_data": sigma_data}
    name = {"cosine": "squaredcos_cap_v2"}.get(path, path)
    types = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
    if name not in BETAS or prediction not in types:
        raise ValueError(
            f"path {path!r} with prediction {prediction!r}: expected scaled_linear, linear or cosine with "
            f"{', '.join(types)}; or flow or edm"
        )
    start, end = {"linear": (1e-4, 0.02)}.get(name, (0.00085, 0.012))
    of_class: dict[str, Any] = {"_class_name": "DDIMScheduler", "set_alpha_to_one": True}
    if learned_variance:
        of_class = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    # The cosine table's last row is all but pure noise, sigma 20291, times which an error of epsilon is in x_0. With
    # fewer than 500 leading steps it is left out.
    begins_late = name == "squaredcos_cap_v2" and prediction in ("epsilon", "mean")
    return {
        **of_class,
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": name,
        "trained_betas": None,
        "prediction_type": types[prediction],
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "steps_offset": 1,
        "timestep_spacing": "leading" if begins_late else "trailing",
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "rescale_betas_zero_snr": zero_snr,
    }


def schedule_from(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """(schedule, prediction) of a scheduler config; ValueError naming a value from which no table can be built.

    Its other keys are about sampling (`pipelines.scheduler`).
    """
    if "path" in config:
        if config["path"] not in ("flow", "edm"):
            raise ValueError(f"path={config['path']!r} is not implemented: flow and edm are, and tables of betas")
        return RectifiedFlow() if config["path"] == "flow" else EDM(config["sigma_data"]), config["prediction"]
    name = config.get("_class_name", "")
    if name.startswith(("FlowMatch", "EDM")):  # whose levels are of no beta table
        raise ValueError(
            f"the scheduler {name} is not implemented: expected one over a table of betas, such as DDIMScheduler "
            "(flows and EDM are opened from this project's own training runs)"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction!r} is not implemented: {', '.join(PREDICTION_TYPES)} are")
    if (betas := config.get("trained_betas")) is not None:
        schedule = VariancePreserving(torch.tensor(betas, dtype=torch.float32))
    else:
        name, count = config.get("beta_schedule", "linear"), int(config.get("num_train_timesteps", 1000))
        if name not in BETAS:
            raise ValueError(f"beta_schedule={name!r} is not implemented: {', '.join(BETAS)} are")
        ends = {k: float(config[k]) for k in ("beta_start", "beta_end") if k in config}
        schedule = BETAS[name](num_train_timesteps=count, **({} if name == "squaredcos_cap_v2" else ends))
    if config.get("rescale_betas_zero_snr"):
        schedule = schedule.zero_terminal_snr()
    return schedule, PREDICTION_TYPES[prediction]


def for_atelier_alone(model: Model) -> str:
    """Why no other tool can open this model, or "" when they can."""
    if "path" in model.scheduler:
        return f"the path {model.scheduler['path']!r} has no scheduler config in a Stable Diffusion folder"
    if model.prediction == "mean":
        return "no scheduler config knows a U-Net that predicts the mean of a step"
    if model.learned_variance:
        return "its U-Net learns the variance, which guidance in a StableDiffusionPipeline would extrapolate as well"
    if not isinstance(model.unet, UNet):
        return "its U-Net, for small pictures, has a layout of its own"
    if not isinstance(model.conditioner, ClipTextEncoder | ClipTextPair):
        return f"its conditioning is {type(model.conditioner).__name__}, not a CLIP text encoder"
    if not isinstance(model.vae, Autoencoder):
        return "it works on pixels, without an autoencoder"
    return ""


def save_model(model: Model, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the whole model; floating-point weights are stored as `dtype`, by default as they are.

    dtype: torch.int8 stores all but the text encoder (float16) in 8 bits; diffusers does not read such a folder.
    Raises ValueError, before anything is written, for conditioning that has no layout, such as open_clip's.
    """
    check_saved(model.conditioner)
    folder.mkdir(parents=True, exist_ok=True)
    save_network(model.unet, folder / "unet", dtype)
    if isinstance(model.vae, Autoencoder):
        save_network(model.vae, folder / "vae", dtype)
    write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler)
    notes: dict[str, Any] = {**asdict(model.defaults), "vae": type(model.vae).__name__}
    if isinstance(model.vae, Identity):
        notes["channels"] = model.vae.latent_channels
    notes |= save_conditioner(model.conditioner, folder, torch.float16 if dtype is torch.int8 else dtype)
    if model.codes is not None:
        save_network(model.codes, folder / "codes", dtype)
    else:
        shutil.rmtree(folder / "codes", ignore_errors=True)  # of a model that was here before
    write_json(folder / NOTES, notes)
    (folder / "model_index.json").unlink(missing_ok=True)  # of a model that was here before
    if dtype is not torch.int8 and not for_atelier_alone(model):
        assert isinstance(model.conditioner, ClipTextEncoder | ClipTextPair)
        index = {
            "_class_name": (XL_KINDS if model.xl else KINDS)[model.inpaints],
            "_diffusers_version": DIFFUSERS_VERSION,
            **components(model.conditioner),
            "scheduler": ["diffusers", model.scheduler["_class_name"]],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        write_json(folder / "model_index.json", index)


def load_model(
    where: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Model:
    """Opens a model folder, a training run's folder (its newest checkpoint), a hub id, or, for None, the bundled model.

    dtype: of all networks; float32 by default.
    revision: branch or commit of a hub id.
    variant: None or "fp16": which weights to read where a folder has both.
    Raises ValueError when it is none of these, or something in it is missing, broken or not implemented. A scheduler
    config that asks for other sampling than there is gives a warning.
    """
    if variant not in (None, "fp16"):
        raise ValueError(f"variant={variant!r}: expected None or 'fp16'")
    dtype = dtype or torch.float32
    folder = find_model(where, revision=revision, variant=variant)
    said, how = folder / NOTES, folder / "scheduler" / "scheduler_config.json"
    notes = read_json(said) if said.is_file() else {}
    if not notes and (folder / "model_index.json").is_file():
        kind = read_json(folder / "model_index.json").get("_class_name")
        if kind not in KINDS + XL_KINDS:
            known = ", ".join(KINDS + XL_KINDS)
            raise ValueError(f"{folder} holds a {kind}; only the layouts of {known} are implemented")
    small = read_json(folder / "unet" / "config.json").get("_class_name") == "PixelUNet"
    unet = open_network(PixelUNet if small else UNet, folder / "unet", dtype, variant)
    pixels = notes.get("vae") == "Identity"
    scheduler = read_json(how)
    with blaming(how):
        schedule_from(scheduler)
    if pixels and str(notes.get("channels")) not in ("1", "3"):
        raise ValueError(f"{said}: channels is {notes.get('channels')!r}, expected 1 or 3, those of a picture")
    told = load_conditioner(folder, notes, dtype, variant)
    model = Model(
        unet,
        Identity(notes["channels"]) if pixels else load_autoencoder(folder / "vae", None, variant),
        told,
        scheduler,
        # diffusers' defaults, where nothing is said
        Defaults(**({"guidance_scale": 5.0} if isinstance(told, ClipTextPair) else {}) | read_defaults(notes, said)),
        # In float32 for any dtype: codes are few numbers, and inversion wants them exact.
        open_network(CodeDiffusion, folder / "codes") if (folder / "codes").is_dir() else None,
    )
    model.vae.to(model.vae_dtype(dtype))
    for part in model.parts():
        part.to(device)
    warn_of_differences(scheduler, model.learned_variance, model.steps_offset)
    return model
