"""The settings of `train/ldm.py`: every field is a flag. Where to start from: `train.presets`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ldm.pixel_unet import PixelUNetConfig
from ldm.unet import UNetConfig
from train.config import at_least_one
from train.launch import MixedPrecision

# Attention's projections, by the names that they have in the U-Net and in CLIP's text encoder.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
# Settings that mean nothing without another, and whoever gives them alone has forgotten it.
BELONGS = {
    "keep_tags": "shuffle_tags",
    "lora_alpha": "lora_rank",
    "lora_targets": "lora_rank",
    "token_from": "token",
    "token_vectors": "token",
    "prior_pictures": "prior",
    "prior_weight": "prior",
}
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

    data: str = "shapes"  # folder, .parquet, .tar, hub set, "shapes", "pictograms[:NAMES]"; [NUMBER*]SOURCE joined by +
    template: str = ""  # makes captions of columns or fields, such as "a photo of {label}"
    shuffle_tags: bool = False  # comma-separated parts of a caption come in any order
    keep_tags: int = 0  # of --shuffle-tags: the first so many keep their places
    streaming: bool = False  # read .parquet, .tar and hub sets as they come; nothing is cached
    buckets: bool = False  # aspect ratios stay about what they are: rectangles of about size² pixels, not squares
    output: Path = Path("runs/shapes")  # checkpoints, sample grids and logs
    model: str = ""  # model to fine-tune: folder, hub id or "bundled"; "" trains a new U-Net
    train: tuple[Literal["unet", "text_encoder"], ...] = ("unet",)  # what learns, or gets adapters
    lora_rank: int = 0  # above 0: learn adapters of this rank beside --model's weights, which stay as they are
    lora_alpha: int | None = None  # adapters count alpha / rank times; None: once
    lora_targets: tuple[str, ...] = LORA_TARGETS  # ends of the names of the layers that get adapters
    token: str = ""  # learn this new word of --model's text encoder, and nothing else (textual inversion)
    token_from: str = ""  # a known word that it begins as, such as "toy"
    token_vectors: int = 1  # how many vectors the word stands for
    # Captions whose look shall stay, "a dog" or many: --model paints them first and learns from that, too (DreamBooth).
    prior: tuple[str, ...] = ()
    prior_pictures: int = 200  # how many pictures of them, in turn; half of what is seen is theirs
    prior_weight: float = 1.0  # of the loss on those pictures
    inpainting: bool = False  # the U-Net is also told a mask and what lies around it
    unet: UNetConfig | PixelUNetConfig = SMALL  # of a new model; channels follow the autoencoder and the encoder
    vae: str = "bundled"  # autoencoder of a new model: folder, hub id, "bundled", or "none" for pixels, "grey" for grey
    text_encoder: str = "bundled"  # conditioning of a new model: model folder, "bundled", "labels" or "none"
    path: Literal["scaled_linear", "linear", "cosine", "flow", "edm"] = "scaled_linear"
    prediction: Literal["epsilon", "sample", "v", "velocity", "edm", "mean"] = "v"  # mean: with --weight elbo
    learned_variance: bool = False  # a new U-Net also learns the variance of DDPM's steps; for the sampler "ddpm"
    zero_snr: bool = False  # rescale the betas to end in pure noise
    sigma_data: float = 1.0  # of the path "edm": standard deviation of the data; latents have 1, pixels about 0.5
    noise: Literal["uniform", "log_normal", "logit_normal"] = "log_normal"  # distribution of training noise
    noise_mean: float | None = None  # of log(sigma), not for uniform; None: 0.4, or the paper's for logit_normal, 0
    noise_std: float | None = None  # of log(sigma), likewise; None: 1.4, or the paper's for logit_normal, 1
    weight: Literal["plain", "min_snr", "soft_min_snr", "debiased", "edm", "x0", "elbo"] = "plain"
    huber: float = 0.0  # c of the pseudo-Huber loss, 0.1 for instance; 0: the square
    offset_noise: float = 0.0  # deviation of noise that is one number for a channel, 0.05 for instance
    perturbation: float = 0.0  # more noise that the network sees and is not told of, 0.1 for instance
    min_snr_gamma: float = 5.0  # largest weight of "min_snr"
    min_snr_floor: float = 0.0  # smallest; above 0 for a path that ends in pure noise
    caption_dropout: float = 0.1  # share of captions replaced by the null context, for classifier-free guidance
    size: int | None = None  # side of the pictures in pixels; None: what model or autoencoder were trained on
    views: int = 1  # how often each drawn pictogram is drawn, each time a little differently
    updates: int = 1200  # optimizer updates in all
    batch_size: int = 32  # pictures in one step of one process
    accumulate: int = 1  # steps in one update
    optimizer: Literal["muon", "adamw", "adamw8bit"] = "muon"  # Muon moves the matrices, AdamW the rest or all
    learning_rate: float = 2e-3  # of Muon; 1e-4 is AdamW's usual one for what has learnt already
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
    keep: int = 2  # newest checkpoints that stay
    tracker: str = "tensorboard"  # who gets the numbers: any tracker of Accelerate that is installed
    prompts: tuple[str, ...] = ()  # of the sample grid; by default some of the data's own
    steps: int | None = None  # of the sampler, the model's default from now on; None: 20, or what it was before
    guidance_scale: float | None = None  # the model's default from now on; None: 3, or what it was before
    guidance_interval: tuple[float, float] | None = None  # likewise, noise levels; None: all, or what it was before
    sampler: str | None = None  # the model's default; None: dpmpp_2m (ddpm, if the variance is learned), or before
    workers: int = 2  # processes that read pictures
    cache: Path = Path("cache")  # latents
    font: str | None = None  # the colour emoji font's file, for pictograms

    def __post_init__(self) -> None:
        at_least_one(self, "updates", "batch_size", "accumulate", "checkpoint_every", "keep", "steps", "views", "size")
        at_least_one(self, "token_vectors", "prior_pictures", "lora_alpha")
        for name in ("keep_tags", "lora_rank", "huber", "offset_noise", "perturbation", "prior_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: expected at least 0")
        for name, owner in BELONGS.items():
            value, default = getattr(self, name), Config.__dataclass_fields__[name].default
            given = tuple(value) != default if isinstance(default, tuple) else value != default
            if given and not getattr(self, owner):
                said, missing = (f"--{field.replace('_', '-')}" for field in (name, owner))
                raise ValueError(f"{said} belongs to {missing}, which is not given: add it, or leave {said} out")
        if self.noise == "uniform" and (self.noise_mean, self.noise_std) != (None, None):
            raise ValueError("--noise uniform has no mean and no deviation: leave out --noise-mean and --noise-std")
        if self.weight != "min_snr" and (self.min_snr_gamma, self.min_snr_floor) != (5.0, 0.0):
            raise ValueError(f"--min-snr-gamma and --min-snr-floor belong to --weight min_snr, not {self.weight}")
        if not self.train or len(set(self.train)) < len(self.train):
            raise ValueError(f"--train {' '.join(self.train)}: expected unet, text_encoder or both")
        for name in ("lora_rank", "token", "prior"):
            if getattr(self, name) and not self.model:
                raise ValueError(
                    f"--{name.replace('_', '-')} adds to a model that can paint already: name it by --model"
                )
        if self.token and (self.lora_rank or self.train != ("unet",)):
            raise ValueError("--token learns a word and nothing else: leave out --lora-rank and --train")
        if self.inpainting and (self.token or self.lora_rank or "unet" not in self.train):
            raise ValueError(
                "--inpainting teaches the whole U-Net: leave out --token, --lora-rank, and --train of others"
            )
        if not all(caption.strip() for caption in self.prior):
            raise ValueError(f"--prior {self.prior}: expected captions of what shall stay as it is, such as 'a dog'")
        if self.prior_pictures < len(self.prior):
            raise ValueError(
                f"--prior-pictures {self.prior_pictures}: expected one at least of each of {len(self.prior)} captions"
            )
        if self.prior and (self.template or self.streaming):
            raise ValueError(
                "--prior wants pictures with captions of their own here: leave out --template, --streaming"
            )
        if not self.clip > 0 or not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"--clip {self.clip}, --ema-decay {self.ema_decay}: expected above 0, and from 0 to below 1"
            )
        if self.learned_variance and (self.huber or self.perturbation):
            raise ValueError("--learned-variance has a loss of its own: leave out --huber and --perturbation")
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
