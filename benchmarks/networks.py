"""Our U-Net and autoencoder beside diffusers' on the same weights: time of a forward pass, and of one with backward.

    python benchmarks/networks.py [--repeats 30] [--threads 2] [--device cuda] [--out networks.json]

Both sides take turns within one run; what counts is the shortest time of each, and the ratio. Each side runs in plain
and in `channels_last` memory format; a ratio compares the better of each. A guided sampling step is a batch of two, and
ours keeps the keys and values of the text from step to step, as a pipeline does (`UNet.reuse_contexts`).
"""

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ldm.unet import UNet, UNetConfig
from train.machine import described
from vae.autoencoder import Autoencoder, AutoencoderConfig

Side = tuple[nn.Module, Callable[[Any, Tensor], Tensor]]  # a network, and how to call it
Row = dict[str, Any]  # of the results

UNETS = {  # name: config, latent side, tokens of text
    "U-Net 64-128-192, 16x16x4 latents": (
        UNetConfig(
            block_out_channels=(64, 128, 192),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=256,
            attention_head_dim=4,
        ),
        16,
        77,
    ),
    "U-Net as SD 1.5, a fifth as wide, 32x32x4 latents": (
        UNetConfig(block_out_channels=(64, 128, 256, 256), cross_attention_dim=768),
        32,
        77,
    ),
}
AUTOENCODERS = {  # name: config, picture side
    "autoencoder KL-f8 16-48-96-128, 128x128": (
        AutoencoderConfig(block_out_channels=(16, 48, 96, 128), norm_num_groups=16, latent_channels=8),
        128,
    ),
}


@dataclass(frozen=True)
class Options:
    repeats: int = 30  # turns of each side, after one that warms it up
    threads: int = torch.get_num_threads()
    device: str = "cpu"
    out: Path | None = None  # JSON with the figures


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    told = {"machine": described(), "threads": options.threads, "repeats": options.repeats, "device": options.device}
    print(f"{told['machine']}, {options.threads} threads, float32, shortest of {options.repeats}")
    rows: list[Row] = []
    for name, (config, side, tokens) in UNETS.items():
        rows += unet(name, config, side, tokens, options)
    for name, (autoencoder_config, side) in AUTOENCODERS.items():
        rows += autoencoder(name, autoencoder_config, side, options)
    if options.out:
        options.out.write_text(json.dumps(told | {"rows": rows}, indent=2) + "\n")


def unet(name: str, config: UNetConfig, side: int, tokens: int, options: Options) -> Iterator[Row]:
    ours = UNet(config).to(options.device)
    theirs = UNet2DConditionModel.from_config(config.to_dict()).to(options.device)
    theirs.load_state_dict(ours.state_dict())
    for batch, training in ((2, False), (16, False), (16, True)):
        sample = torch.randn(batch, config.in_channels, side, side, device=options.device)
        timestep = torch.randint(1000, (batch,), device=options.device)
        text = torch.randn(batch, tokens, config.cross_attention_dim, device=options.device)

        def predict(model: nn.Module, x: Tensor, timestep: Tensor = timestep, text: Tensor = text) -> Tensor:
            return model(x, timestep, text)

        def predict_theirs(model: nn.Module, x: Tensor, timestep: Tensor = timestep, text: Tensor = text) -> Tensor:
            return model(x, timestep, text, return_dict=False)[0]

        yield compare(name, batch, training, (ours, predict), (theirs, predict_theirs), sample, options)


def autoencoder(name: str, config: AutoencoderConfig, side: int, options: Options) -> Iterator[Row]:
    ours = Autoencoder(config).to(options.device)
    theirs = AutoencoderKL.from_config(config.to_dict()).to(options.device)
    theirs.load_state_dict(ours.state_dict())
    scale = config.scaling_factor

    def decode(model: Any, latents: Tensor) -> Tensor:
        return model.decode(latents)

    def decode_theirs(model: Any, latents: Tensor) -> Tensor:
        return model.decode(latents / scale, return_dict=False)[0]

    def both(model: Any, images: Tensor) -> Tensor:
        return model(images)[0]

    def both_theirs(model: Any, images: Tensor) -> Tensor:
        return model(images, return_dict=False)[0]

    latents = torch.randn(1, config.latent_channels, side // ours.downscale, side // ours.downscale)
    yield compare(f"{name}, decode", 1, False, (ours, decode), (theirs, decode_theirs), latents, options)
    images = torch.rand(4, config.in_channels, side, side) * 2 - 1
    yield compare(f"{name}, both ways", 4, True, (ours, both), (theirs, both_theirs), images, options)


def compare(name: str, batch: int, training: bool, ours: Side, theirs: Side, x: Tensor, options: Options) -> Row:
    """Prints and returns one row: milliseconds of both, their ratio, and how far the outputs are apart."""
    x = x.to(options.device)
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {}
    with ExitStack() as scopes:
        for side, (model, run) in {"ours": ours, "diffusers": theirs}.items():
            for memory in (torch.contiguous_format, torch.channels_last):
                candidate = copy.deepcopy(model).train(training).to(memory_format=memory)
                if isinstance(candidate, UNet) and not training:
                    scopes.enter_context(candidate.reuse_contexts())
                pictures = x.contiguous(memory_format=memory)
                calls[side, str(memory)] = (
                    _backward(candidate, run, pictures) if training else _forward(candidate, run, pictures)
                )
        outputs = {side: call() for (side, _), call in calls.items()}
        seconds = shortest(calls, options)
    best = {side: min(time for (s, _), time in seconds.items() if s == side) for side in ("ours", "diffusers")}
    apart = (outputs["ours"] - outputs["diffusers"]).abs().max().item()
    row = {
        "what": f"{name}, batch {batch}, {'forward and backward' if training else 'forward'}",
        "ours_ms": best["ours"] * 1e3,
        "diffusers_ms": best["diffusers"] * 1e3,
        "ratio": best["diffusers"] / best["ours"],
        "apart": apart,
    }
    line = "{what}: ours {ours_ms:.1f} ms, diffusers {diffusers_ms:.1f} ms, {ratio:.2f} times as fast "
    print((line + "(outputs differ by {apart:.0e})").format(**row), flush=True)
    return row


def _forward(model: nn.Module, run: Callable[[Any, Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: run(model, x))


def _backward(model: nn.Module, run: Callable[[Any, Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        model.zero_grad()
        output = run(model, x)
        output.square().mean().backward()
        return output.detach()

    return step


def shortest(calls: Mapping[Any, Callable[[], Any]], options: Options) -> dict[Any, float]:
    """Shortest wall-clock time of each in seconds; they take turns, so that a busy moment strikes all."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(max(options.repeats, 1)):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.device(options.device).type == "cuda":
                torch.cuda.synchronize(options.device)
            times[key].append(time.perf_counter() - start)
    return {key: min(values) for key, values in times.items()}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
