"""Settings of `train/vae.py`, and where its runs start from: --preset NAME."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from train.config import at_least_one, check_clip
from train.launch import MixedPrecision
from vae.autoencoder import AutoencoderConfig
from vae.losses import LossWeights

TINY = AutoencoderConfig(
    block_out_channels=(8, 16, 32, 32), latent_channels=4, norm_num_groups=4, mid_block_add_attention=False
)
F8 = AutoencoderConfig(  # 128×128 pictures become 16×16×16 latents
    block_out_channels=(16, 48, 96, 128),
    latent_channels=16,
    norm_num_groups=8,
    mid_block_add_attention=False,
    sample_size=128,
)


def _of_32(widths: tuple[int, ...], latent_channels: int) -> AutoencoderConfig:
    """A network for pictures of 32×32, each width after the first halving their side."""
    return AutoencoderConfig(
        block_out_channels=widths,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=32,
    )


@dataclass(frozen=True)
class Config:
    """Settings of one autoencoder."""

    data: str = "shapes"  # folder, .parquet, .tar, hub set, "shapes", "pictograms[:NAMES]" (or ":all")
    output: Path = Path("runs/vae")  # checkpoints, sample grids and logs
    init: str | None = None  # an autoencoder to fine-tune, instead of a new `model`: folder, hub id, or "bundled"
    decoder_only: bool = False  # of --init: the latents stay as they are, and so does every model in them
    # Of --decoder-only: noise in what is decoded, whose levels are half-normal with this deviation (latents have 1), so
    # that pictures do not show what a sampler gets wrong of them (arXiv:2510.11690).
    latent_noise: float = 0.0
    model: AutoencoderConfig = TINY  # the network to train from nothing
    size: int | None = 64  # side of the pictures in pixels; None: what the autoencoder of --init was trained on
    crop: int = 64  # side of the random squares that are trained on
    views: int = 1  # how often each drawn pictogram is drawn, each time a little differently
    updates: int = 1000  # optimizer updates in all
    batch_size: int = 16  # crops in one update on one process
    learning_rate: float = 1e-3
    warmup: int = 200  # updates of linear warm-up before the cosine
    ema_decay: float = 0.999
    clip: float = 1.0  # largest norm of the gradient
    mirror: bool = True  # train on mirrored crops, too
    loss: LossWeights = field(default_factory=LossWeights)
    turned: bool = False  # what loss.halved decodes is turned by quarters, too (EQ-VAE, arXiv:2502.09509, equation 4)
    discriminator_width: int = 32  # of the patch discriminator, used when loss.adversarial > 0
    mixed_precision: MixedPrecision | None = None  # None: what the launcher was told
    seed: int = 0
    checkpoint_every: int = 500  # updates
    workers: int = 2  # processes that read pictures
    cache: Path = Path("cache")  # decoded pictures
    font: str | None = None  # the colour emoji font's file, for pictograms

    def __post_init__(self) -> None:
        at_least_one(self, "updates", "batch_size", "crop", "size", "views", "checkpoint_every")
        check_clip(self)
        if self.decoder_only and not self.init:
            raise ValueError("--decoder-only keeps the encoder of an autoencoder: name it by --init")
        if self.latent_noise < 0 or (self.latent_noise and not self.decoder_only):
            raise ValueError(
                f"--latent-noise {self.latent_noise}: expected at least 0, and --decoder-only, for an encoder that "
                "learns would make its latents larger"
            )
        if self.size is not None and self.crop > self.size:
            raise ValueError(f"--crop {self.crop} is larger than --size {self.size}")
        shown = (self.loss.pixel, self.loss.squared, self.loss.gradient)
        if not any((*shown, self.loss.elbo, self.loss.perceptual)):
            raise ValueError("--loss has no weight for how near a picture comes to its own: give --loss.pixel one")
        if self.turned and not self.loss.halved:
            raise ValueError("--turned is of --loss.halved, which is 0: give it a weight, 0.25 for instance")
        if self.loss.halved and not any(shown):
            raise ValueError("--loss.halved is of --loss.pixel, .squared and .gradient, which are 0: leave it out")
        if self.loss.texture and self.crop < 16:
            raise ValueError(f"--crop {self.crop}: texture is measured in squares of at least 16, or --loss.texture 0")
        if self.loss.adversarial and self.crop < 24:
            raise ValueError(f"--crop {self.crop}: the discriminator needs at least 24 pixels, or --loss.adversarial 0")


# 3.1 M parameters, trained on 64×64 out of the pictures.
NEW = Config(
    data="",
    model=F8,
    size=128,
    updates=4000,
    batch_size=32,
    learning_rate=3e-3,
    loss=LossWeights(halved=0.25),  # latents that are easier to diffuse
)
PRESETS = {
    # Taken without --data: first steps.
    "shapes": Config(),
    # Taken when --data is given, and no --init.
    "new": NEW,
    # Taken when --init is given.
    "fine-tune": Config(data="", size=None, learning_rate=1e-4),
    # The bundled model's. Its card has times and scores.
    "bundled": replace(NEW, data="pictograms+shapes", output=Path("runs/bundled-vae"), mixed_precision="bf16"),
    # accelerate launch train/vae.py --preset mnist --data mnist-train.parquet: 4×4 pixels become one of 8×8×4 latents.
    # 11.5 minutes on one core of an AMD EPYC, 186 crops/s: 40.1 dB on 64 pictures.
    "mnist": Config(
        data="",
        output=Path("runs/mnist-vae"),
        model=_of_32((16, 32, 64), 4),
        size=32,
        crop=32,
        mirror=False,
        updates=2000,
        batch_size=64,
        learning_rate=3e-3,
    ),
    # Likewise, a plain VAE, 16 numbers a picture, trained on its bound; samples are below the reconstructions. About 17
    # minutes at 122 crops/s: 22.4 dB, a bound of 0.35 nats of density for each value, most samples are digits.
    "mnist-elbo": Config(
        data="",
        output=Path("runs/mnist-elbo"),
        model=_of_32((16, 32, 64, 64, 128, 128), 16),
        size=32,
        crop=32,
        mirror=False,
        updates=2000,
        batch_size=64,
        learning_rate=2e-3,
        loss=LossWeights(pixel=0, squared=0, gradient=0, kl=0, elbo=1),
    ),
    # Likewise, --data cifar10-train.parquet: 11 minutes of processor time, 36.7 dB on 64 pictures.
    "cifar10": Config(
        data="",
        output=Path("runs/cifar10-vae"),
        model=_of_32((16, 32, 64), 12),
        size=32,
        crop=32,
        updates=2000,
        batch_size=64,
        learning_rate=3e-3,
    ),
}
