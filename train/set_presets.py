"""Presets of `train/ldm.py` for known sets of small pictures, whose file or folder is given by --data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.pixel_unet import PixelUNetConfig
from ldm.unet import UNetConfig
from train.settings import SMALL, Config

# EDM in pixel space (arXiv:2206.00364, table 1), as S. Nguyen, "Diffusion model" (lecture, 2023), has it: its network,
# its batches of 32, no EMA, Adam at 1e-4 from the first update on, a fifth of the labels dropped, 50 Euler steps. As
# everywhere here, Adam's betas are 0.9 and 0.99, and gradients are clipped at a norm of 1.
PIXELS = Config(
    data="",
    vae="none",
    text_encoder="none",
    path="edm",
    prediction="edm",
    sigma_data=0.5,
    noise_mean=-1.2,
    noise_std=1.2,
    unet=PixelUNetConfig(),
    caption_dropout=0.2,
    size=32,
    learning_rate=1e-4,
    optimizer="adamw",
    schedule="constant",
    warmup=0,
    ema_decay=0.0,
    batch_size=32,
    steps=50,
    sampler="euler",
    checkpoint_every=5000,
)
LABELS = replace(PIXELS, text_encoder="labels")
CELEBA = replace(PIXELS, size=128, updates=300_000, sampler="stochastic_heun")
TINY = PixelUNetConfig(
    block_out_channels=(64, 128, 256, 512), layers_per_block=(1, 2, 4, 4), attention_heads=(0, 0, 0, 8)
)
WIDE = PixelUNetConfig(
    block_out_channels=(64, 128, 256, 512, 1024), layers_per_block=(2, 2, 2, 2, 2), attention_heads=(0, 0, 0, 4, 4)
)
WITHOUT_ATTENTION = PixelUNetConfig(attention_heads=(0, 0, 0))

LECTURE = {
    # That lecture's models, --data FILE.parquet or FOLDER, and what it reports, not what was reached here: the
    # Fréchet Inception distance to train, validation and test pictures. An epoch of CIFAR-10 is 1,250 updates of its
    # 40,000 training pictures. FashionMNIST, 100 epochs, guidance 1: 9.2 / 10.5 / 10.3; without attention 13.9 / 15.1
    # / 14.7; unconditional 19.1 / 20.2 / 19.6.
    "fashion": replace(LABELS, vae="grey", output=Path("runs/fashion"), updates=150_000, guidance_scale=1.0),
    "fashion-without-attention": replace(
        LABELS,
        vae="grey",
        unet=WITHOUT_ATTENTION,
        output=Path("runs/fashion-without-attention"),
        updates=150_000,
        guidance_scale=1.0,
    ),
    "fashion-unconditional": replace(PIXELS, vae="grey", output=Path("runs/fashion-unconditional"), updates=150_000),
    # CIFAR-10, 200 epochs, guidance 2.5: 20.4 / 22.5 / 22.5; without attention 22.8 / 24.8 / 24.3; unconditional
    # 28.5 / 30.7 / 30.7.
    "cifar10": replace(LABELS, output=Path("runs/cifar10"), updates=250_000, guidance_scale=2.5),
    "cifar10-without-attention": replace(
        LABELS,
        unet=WITHOUT_ATTENTION,
        output=Path("runs/cifar10-without-attention"),
        updates=250_000,
        guidance_scale=2.5,
    ),
    "cifar10-unconditional": replace(PIXELS, output=Path("runs/cifar10-unconditional"), updates=250_000),
    # CelebA at 128×128, 125 epochs of 64, 50 stochastic Heun steps: tiny (35 M)
    # 22.1 / 23.2 / 21.9, without attention 26.7 / 27.7 / 26.4; small (80 M) 17.9 / 19.0 / 18.3; big (81 M) not
    # reported.
    "celeba-tiny": replace(CELEBA, unet=TINY, output=Path("runs/celeba-tiny"), batch_size=64),
    "celeba-tiny-without-attention": replace(
        CELEBA,
        unet=replace(TINY, attention_heads=(0, 0, 0, 0)),
        output=Path("runs/celeba-tiny-without-attention"),
        batch_size=64,
    ),
    "celeba-small": replace(CELEBA, unet=WIDE, output=Path("runs/celeba-small")),
    "celeba-big": replace(CELEBA, unet=replace(WIDE, attention_heads=(0, 0, 4, 8, 8)), output=Path("runs/celeba-big")),
}

# MNIST and CIFAR-10 within minutes: accelerate launch train/ldm.py --preset NAME --data mnist-train.parquet, or
# cifar10-train.parquet. Times are of one core of an AMD EPYC. "Right" is the share of samples that
# `atelier evaluate` with a classifier of clean digits (99.0% of test digits right) finds to be the digit asked for;
# "errors" are those of the validation at sigma 0.25, 0.5, 1, 2 and 8; bits those of `atelier bits` on test pictures
# (of CIFAR-10 a copy that was JPEG, which is easier to tell: no comparison with published bits).
SMALL_PIXELS = PixelUNetConfig(block_out_channels=(32, 64, 128), attention_heads=(0, 0, 4))
DIGITS = Config(
    data="",
    vae="grey",
    text_encoder="labels",
    path="edm",
    prediction="edm",
    sigma_data=0.5,
    noise_mean=-0.8,
    noise_std=1.4,
    unet=SMALL_PIXELS,
    size=28,
    updates=2000,
    batch_size=32,
    learning_rate=3e-3,
    ema_decay=0.998,
    mixed_precision="bf16",
    guidance_scale=1.5,
    checkpoint_every=500,
)
PHOTOS = replace(DIGITS, vae="none", size=32, updates=4000, guidance_scale=2.0, checkpoint_every=1000)
ON_TABLE: dict[str, Any] = {
    "path": "linear",
    "prediction": "v",
    "sigma_data": 1.0,
    "noise_mean": -0.8,
    "noise_std": 1.8,
}
TEXT_IN_PIXELS = UNetConfig(
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
    norm_num_groups=8,
)
FAST_IN_PIXELS = UNetConfig(
    block_out_channels=(16, 48, 96, 160),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
    norm_num_groups=8,
)
LATENT_DIGITS = Config(
    data="",
    vae="runs/mnist-vae",  # as `train/vae.py --preset mnist` writes it
    text_encoder="labels",
    unet=replace(SMALL, block_out_channels=(48, 96), norm_num_groups=8),
    noise_mean=0.0,
    updates=1200,
    batch_size=64,
    learning_rate=3e-3,
    guidance_scale=1.5,
)
LATENT_PHOTOS = replace(
    LATENT_DIGITS,
    vae="runs/cifar10-vae",
    unet=replace(SMALL, norm_num_groups=8),
    guidance_scale=2.0,
)

SMALL_SETS = {
    # 9 min 49 s, 116 pictures/s: 97.2% of 500 digits right.
    "mnist": replace(DIGITS, output=Path("runs/mnist")),
    # 10 min 50 s, 99 pictures/s: 1.69 ± 0.02 bits per dimension by the bound (128 pictures, 100 rows), 2.48 ± 0.04 by
    # the flow (32 pictures), whose pictures have the noise of the first row, 0.01: even grounds alone cost it 1.7.
    "mnist-unconditional": replace(DIGITS, text_encoder="none", output=Path("runs/mnist-unconditional"), **ON_TABLE),
    # 7 min 56 s, 83 pictures/s: 98.0% of 200 digits right.
    "mnist-text": replace(
        DIGITS,
        text_encoder="bundled",
        unet=TEXT_IN_PIXELS,
        output=Path("runs/mnist-text"),
        updates=1200,
        mixed_precision="no",
        **ON_TABLE,
    ),
    # In the latents of `train/vae.py --preset mnist`. 4 min 54 s, 345 pictures/s, 70 s of it for the latents, which are
    # kept: 96.2% of 500 digits right.
    "mnist-latent": replace(LATENT_DIGITS, output=Path("runs/mnist-latent")),
    # 4 min 6 s, 323 pictures/s: of 200 digits between 5% and 14% are of each class; 2.48 ± 0.04 bits, of all three
    # colours of 32×32 pixels, which say the same (256 pictures, 50 rows).
    "mnist-latent-unconditional": replace(
        LATENT_DIGITS, text_encoder="none", output=Path("runs/mnist-latent-unconditional")
    ),
    # 8 min 54 s of processor time: 97.6% of 500 digits right.
    "mnist-latent-text": replace(LATENT_DIGITS, text_encoder="bundled", output=Path("runs/mnist-latent-text")),
    # 25 min 40 s, 85 pictures/s: skies, seas, lawns, now and then a ship or a car; errors 0.0306, 0.0703, 0.1454,
    # 0.2706, 0.6198. Without attention, 23 min 54 s, they are 0.0309, 0.0710, 0.1472, 0.2731, 0.6208.
    "cifar10-small": replace(PHOTOS, output=Path("runs/cifar10-small")),
    "cifar10-small-without-attention": replace(
        PHOTOS,
        unet=replace(SMALL_PIXELS, attention_heads=(0, 0, 0)),
        output=Path("runs/cifar10-small-without-attention"),
    ),
    # 13 min 20 s, 81 pictures/s: 3.45 ± 0.03 bits (64 pictures, 50 rows), 1.97 of it for the last step; errors 0.031,
    # 0.072, 0.150, 0.278, 0.655.
    "cifar10-small-unconditional": replace(
        PHOTOS, text_encoder="none", output=Path("runs/cifar10-small-unconditional"), updates=2000, **ON_TABLE
    ),
    # 17 min 20 s, 63 pictures/s: grounds, colours, now and then a bird, a car or a ship; errors 0.033, 0.075, 0.155,
    # 0.282, 0.629.
    "cifar10-text": replace(
        PHOTOS,
        text_encoder="bundled",
        unet=TEXT_IN_PIXELS,
        output=Path("runs/cifar10-text"),
        updates=2000,
        mixed_precision="no",
        **ON_TABLE,
    ),
    # For benchmarks/cifar10.py, about an hour of one core: a fifth of the arithmetic of "cifar10" for a picture, and 14
    # evaluations for a sample, as four of the ten steps are guided. benchmarks/README.md has what it reaches. Painting
    # was chosen after this training, by Fréchet distances of 500 samples of another seed to held-out pictures (features
    # of `train/recogniser.py --preset cifar10`, no FID): twelve steps, guidance 2 between 0.3 and 5 58.5, 4 there 47.5;
    # ten, 4 between 0.3 and 20 43.0; eight, 4 between 0.05 and 80 41.7, but specks. "cifar10" hardly gains by the like:
    # twelve steps at 2 90.5, nine at 4.5 113, as it is 93.9.
    # Trainings of ten minutes mislead: batches of 32 at 4e-3, less noise and no attention (nor text) on 8×8 brought
    # those from 90 to 75 (noise about -1.2) and 71 (-1.6), but give 57.3 after the hour (-1.4), with larger errors from
    # sigma 0.5 on.
    "cifar10-fast": replace(
        PHOTOS,
        text_encoder="bundled",
        unet=FAST_IN_PIXELS,
        output=Path("runs/cifar10-fast"),
        updates=2800,
        batch_size=64,
        steps=10,
        guidance_scale=4.0,
        guidance_interval=(0.3, 20.0),
        checkpoint_every=350,
    ),
    # In the latents of `train/vae.py --preset cifar10`. 8 min 17 s, 177 pictures/s: the grounds and colours of the
    # classes are right, there are no things yet; 5.65 ± 0.06 bits (128 pictures, 50 rows), told the class.
    "cifar10-latent": replace(LATENT_PHOTOS, output=Path("runs/cifar10-latent")),
    # 5 min 48 s, 233 pictures/s: textures and colours of photographs, no things; errors 0.042, 0.110, 0.230, 0.384,
    # 0.735.
    "cifar10-latent-unconditional": replace(
        LATENT_PHOTOS, text_encoder="none", output=Path("runs/cifar10-latent-unconditional")
    ),
    # Errors 0.0406, 0.1050, 0.2207, 0.3734, 0.7083; told the class they are 0.0426, 0.1110, 0.2299, 0.3817, 0.7158.
    "cifar10-latent-text": replace(LATENT_PHOTOS, text_encoder="bundled", output=Path("runs/cifar10-latent-text")),
}
