"""Where a run of `train/ldm.py` starts from: --preset NAME."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldm.pixel_unet import PixelUNetConfig
from train.settings import SMALL, Config

# EDM in pixel space (arXiv:2206.00364, table 1), as S. Nguyen, "Diffusion model" (lecture, 2023), has it: its network,
# its batches of 32, no EMA, Adam at 1e-4, a fifth of the labels dropped, 50 Euler steps.
PIXELS = Config(
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
    ema_decay=0.0,
    batch_size=32,
    steps=50,
    sampler="euler",
    checkpoint_every=5000,
)
LABELS = replace(PIXELS, text_encoder="labels")
CELEBA = replace(PIXELS, size=128, updates=300_000, sampler="heun")
TINY = PixelUNetConfig(
    block_out_channels=(64, 128, 256, 512), layers_per_block=(1, 2, 4, 4), attention_heads=(0, 0, 0, 8)
)
WIDE = PixelUNetConfig(
    block_out_channels=(64, 128, 256, 512, 1024), layers_per_block=(2, 2, 2, 2, 2), attention_heads=(0, 0, 0, 4, 4)
)
WITHOUT_ATTENTION = PixelUNetConfig(attention_heads=(0, 0, 0))

PRESETS = {
    # First steps, taken when neither --data nor --model is given: the bundled model learns geometry, in 4 min 16 s on
    # 2 cores, 106 pictures a second. Single shapes are right by then, small ones and pairs not always. (From nothing
    # there is not even a square in that time: the latents of the bundled autoencoder take longer to learn.)
    "shapes": Config(
        model="bundled",
        updates=380,
        batch_size=64,
        warmup=20,
        noise_mean=1.2,
        noise_std=1.2,
        ema_decay=0.98,
        checkpoint_every=190,
    ),
    # Taken when --data is given: a small U-Net from nothing between the bundled autoencoder and text encoder.
    "new": Config(output=Path("runs/new")),
    # Taken when --model is given: a gentle rate, a few hundred updates.
    "fine-tune": Config(
        output=Path("runs/fine-tuned"), updates=400, batch_size=16, optimizer="adamw", learning_rate=1e-4, warmup=20
    ),
    # The bundled model's U-Net: in two processes (--batch-size 32) 42 minutes at 102 pictures a second. Its card has
    # the score.
    "bundled": Config(
        data="pictograms",
        output=Path("runs/bundled"),
        unet=replace(SMALL, block_out_channels=(96, 176), norm_num_groups=8),
        updates=4000,
        batch_size=64,
        warmup=150,
        ema_decay=0.998,
        checkpoint_every=500,
        mixed_precision="bf16",
    ),
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
    # CelebA at 128×128, 125 epochs of 64, 50 stochastic Heun steps (deterministic ones by default here): tiny (35 M)
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


def preset_for(arguments: Sequence[str]) -> str:
    """Where a command that names no preset starts from."""
    given = {argument.partition("=")[0] for argument in arguments}
    return "fine-tune" if "--model" in given else "new" if "--data" in given else "shapes"


def check_model_settings(config: Config) -> None:
    """Refuses settings of a new model beside --model, which brings its own."""
    fixed = ("unet", "vae", "text_encoder", "path", "prediction", "zero_snr", "sigma_data")
    known = [PRESETS[name] for name in ("new", "bundled")]
    changed = [n for n in fixed if all(getattr(config, n) != getattr(preset, n) for preset in known)]
    if config.model and changed:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ValueError(
            f"--model {config.model} brings its own {names}: train a new one (--preset new), or leave these out"
        )
