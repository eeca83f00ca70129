"""Where a run of `train/ldm.py` starts from: --preset NAME."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from train.set_presets import LECTURE, SMALL_SETS
from train.settings import SMALL, Config

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
    **LECTURE,
    **SMALL_SETS,
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
