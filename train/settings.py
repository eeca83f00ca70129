"""The settings of `train/ldm.py`: every field is a flag. Where to start from: `train.presets`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ldm.pixel_unet import PixelUNetConfig
from ldm.unet import UNetConfig
from train.launch import MixedPrecision

SMALL = UNetConfig(
    block_out_channels=(64, 128),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=4,
    norm_num_groups=16,
)


@dataclass(frozen=True)
class Config:
    """Settings of one training run."""

    data: str = "shapes"  # folder, .parquet file, "shapes", "pictograms" or "pictograms:all"; several joined by +
    output: Path = Path("runs/shapes")  # checkpoints, sample grids and logs
    model: str = ""  # model to fine-tune: folder, hub id or "bundled"; "" trains a new U-Net
    unet: UNetConfig | PixelUNetConfig = SMALL  # of a new model; channels follow the autoencoder and the encoder
    vae: str = "bundled"  # autoencoder of a new model: folder, "bundled", or "none" for pixels, "grey" for grey ones
    text_encoder: str = "bundled"  # conditioning of a new model: model folder, "bundled", "labels" or "none"
    path: Literal["scaled_linear", "linear", "cosine", "flow", "edm"] = "scaled_linear"
    prediction: Literal["epsilon", "sample", "v", "velocity", "edm", "mean"] = "v"  # mean: with --weight elbo
    learned_variance: bool = False  # a new U-Net also learns the variance of DDPM's steps; for the sampler "ddpm"
    zero_snr: bool = False  # rescale the betas to end in pure noise
    sigma_data: float = 1.0  # of the path "edm": standard deviation of the data; latents have 1, pixels about 0.5
    noise: Literal["uniform", "log_normal", "logit_normal"] = "log_normal"  # distribution of training noise
    noise_mean: float | None = None  # of log(sigma), not for uniform; None: 0.4, or the paper's for logit_normal, 0
    noise_std: float | None = None  # likewise; None: 1.4, or the paper's for logit_normal, 1
    weight: Literal["plain", "min_snr", "edm", "x0", "elbo"] = "plain"
    min_snr_gamma: float = 5.0  # largest weight of "min_snr"
    min_snr_floor: float = 0.0  # smallest; above 0 for a path that ends in pure noise
    caption_dropout: float = 0.1  # share of captions replaced by the null context, for classifier-free guidance
    size: int | None = None  # side of the pictures in pixels; None: what model or autoencoder were trained on
    views: int = 1  # how often each drawn pictogram is drawn, each time a little differently
    updates: int = 1200  # optimizer updates in all
    batch_size: int = 32  # pictures in one step of one process
    accumulate: int = 1  # steps in one update
    optimizer: Literal["muon", "adamw"] = "muon"  # Muon moves the matrices, AdamW the rest or all
    learning_rate: float = 2e-3  # AdamW wants about half of what Muon does
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 100  # updates of linear warm-up
    weight_decay: float = 0.0
    ema_decay: float = 0.995
    clip: float = 1.0  # largest norm of the gradient
    mixed_precision: MixedPrecision | None = None  # None: what the launcher was told
    compile: bool = False  # torch.compile the U-Net
    gradient_checkpointing: bool = False  # less memory, a third more arithmetic
    seed: int = 0
    checkpoint_every: int = 400  # updates; also how often validation runs and a sample grid is painted
    prompts: tuple[str, ...] = ()  # of the sample grid; by default some of the data's own
    steps: int | None = None  # of the sampler, the model's default from now on; None: 20, or what it was before
    guidance_scale: float | None = None  # likewise; None: 3, or what it was before
    guidance_interval: tuple[float, float] | None = None  # likewise, noise levels; None: all, or what it was before
    sampler: str | None = None  # likewise; None: dpmpp_2m (ddpm, if the variance is learned), or before
    workers: int = 2  # processes that read pictures
    cache: Path = Path("cache")  # latents
    font: str | None = None  # the colour emoji font's file, for pictograms

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "accumulate", "checkpoint_every", "steps", "views"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: expected at least 1")
        if self.size is not None and self.size < 1:
            raise ValueError(f"--size is {self.size}: expected at least 1")
        if self.gradient_checkpointing and isinstance(self.unet, PixelUNetConfig):
            raise ValueError("--gradient-checkpointing is for the text U-Net; the one for small pictures has none")
        if self.model and self.learned_variance:
            raise ValueError(f"--model {self.model} brings its own variance: leave out --model, or --learned-variance")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"--caption-dropout is {self.caption_dropout}: expected a share from 0 to below 1")


def settled(config: Config, precision: str) -> Config:
    """The settings with what was left to the launcher and to the kind of noise filled in, as they are recorded."""
    mean, std = config.noise_mean, config.noise_std
    if config.noise == "log_normal":
        mean, std = 0.4 if mean is None else mean, 1.4 if std is None else std
    return replace(config, noise_mean=mean, noise_std=std, mixed_precision=precision)  # type: ignore[arg-type]
