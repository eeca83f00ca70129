"""Where a run of `train/ldm.py` starts from: --preset NAME."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.loss import NOISES
from train.config import flags_in
from train.set_presets import LECTURE, SMALL_SETS
from train.settings import SMALL, Config

# For latents of 16×16: text and attention at 8×8 and 4×4; at the finest level, too, an update takes 1.6 times as long
# (benchmarks/README.md has what that gives).
THREE_LEVELS = replace(
    SMALL,
    block_out_channels=(64, 128, 192),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)

PRESETS = {
    # First steps, taken when neither --data nor --model is given: the bundled model learns geometry, in 6 min 23 s on
    # 2 cores, 40 s of it for the latents. Single shapes and grounds are right by then, small ones and pairs not always.
    # (At 128×128, its own size, 200 updates took 8 min 6 s, and half the grounds were wrong.)
    "shapes": Config(
        model="bundled",
        size=64,
        updates=380,
        batch_size=64,
        warmup=20,
        noise_mean=1.2,
        noise_std=1.2,
        ema_decay=0.98,
        checkpoint_every=190,
    ),
    # Taken when --data is given: a small U-Net from nothing between the bundled autoencoder and text encoder.
    "new": Config(output=Path("runs/new"), unet=THREE_LEVELS, noise_mean=0.7, noise_std=1.5),
    # Taken when --model is given: a gentle rate, a few hundred updates.
    "fine-tune": Config(
        output=Path("runs/fine-tuned"), updates=400, batch_size=16, optimizer="adamw", learning_rate=1e-4, warmup=20
    ),
    # The bundled model's U-Net: in two processes (--batch-size 64). Its card has times and scores, and what of this was
    # measured to be better only after its training had begun.
    "bundled": Config(
        data="pictograms",
        output=Path("runs/bundled"),
        unet=replace(THREE_LEVELS, block_out_channels=(80, 144, 224), norm_num_groups=8),
        views=2,
        updates=4500,
        batch_size=128,
        noise_mean=0.7,
        noise_std=1.5,
        weight="soft_min_snr",
        learning_rate=3e-3,
        warmup=150,
        ema_decay=0.998,
        guidance_scale=2.0,
        steps=16,
        checkpoint_every=500,
        mixed_precision="bf16",
    ),
    **LECTURE,
    **SMALL_SETS,
}


def presets_for(arguments: Sequence[str]) -> dict[str, Config]:
    """PRESETS for a command; where it asks for another kind of noise, without the numbers of their own kind."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    kind = dict(itertools.pairwise(words)).get("--noise")
    without: dict[str, Any] = {"noise": kind, "noise_mean": None, "noise_std": None}
    return {
        name: replace(one, **without) if kind in set(NOISES) - {one.noise} else one for name, one in PRESETS.items()
    }


def preset_for(arguments: Sequence[str]) -> str:
    """Where a command that names no preset starts from."""
    given = flags_in(arguments)
    return "fine-tune" if "--model" in given else "new" if "--data" in given else "shapes"


def check_model_settings(config: Config, arguments: Sequence[str] = ()) -> None:
    """Refuses settings of a new model beside --model, which brings its own.

    arguments: of the command; what it names is refused even where it is what a preset has.
    """
    fixed = ("unet", "vae", "text_encoder", "path", "prediction", "zero_snr", "sigma_data")
    known = [Config(), PRESETS["new"], PRESETS["bundled"]]
    given = {flag.lstrip("-").partition(".")[0].replace("-", "_") for flag in flags_in(arguments)}
    changed = [n for n in fixed if n in given or all(getattr(config, n) != getattr(preset, n) for preset in known)]
    if config.model and changed:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ValueError(
            f"--model {config.model} brings its own {names}: train a new one (--preset new), or leave these out"
        )
