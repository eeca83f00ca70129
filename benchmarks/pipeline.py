"""Atelier against diffusers on the same model folder, in one run:  python benchmarks/pipeline.py [--model FOLDER]

Three figures a side, all taken in turns: from process start to the first picture on the disk, in fresh processes; the
same picture warm, and a batch of 8, in a process of each side that waits while the other paints. Same prompt, same
number of DPM++ 2M steps, same guidance, float32 on a CPU and bfloat16 on a GPU. Without --model a small standard model
is built with random weights: a U-Net of 64, 128, 192 channels on 16×16×4 latents, a CLIP text encoder of 4 layers, a
KL-f8 autoencoder of 3.4 M parameters.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from train.machine import described

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "an oil painting of a fox"
# What a side does, given folder, steps and device: one picture; or as many at once as each line that it reads says.
OURS = """
import sys, time; sys.path.insert(0, {root!r})
import torch
from pipelines import TextToImagePipeline
pipe = TextToImagePipeline.from_pretrained({model!r}, device={device!r}, dtype={dtype})
pipe.set_progress_bar_config(disable=True)
def paint(n): return pipe([{prompt!r}] * n, steps={steps}, guidance_scale=3.0, guidance_interval=(0, float("inf")),
                          seed=0, sampler="dpmpp_2m").images
"""
THEIRS = """
import sys, time
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({model!r}, torch_dtype={dtype}, safety_checker=None).to({device!r})
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
def paint(n): return pipe([{prompt!r}] * n, num_inference_steps={steps}, guidance_scale=3.0,
                          generator=[torch.Generator().manual_seed(i) for i in range(n)]).images
"""
COLD = "paint(1)[0].save({out!r})\n"
WARM = """
paint(1); paint(8)
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter(); paint(int(line)); print(time.perf_counter() - began, flush=True)
"""


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    model: Path | None = None  # a Stable Diffusion folder; by default a small standard model, with random weights
    steps: int = 20
    repeats: int = 9  # of each figure
    device: str = "cpu"
    out: Path | None = None  # JSON with the figures


def random_peer(folder: Path) -> Path:
    """That model, written as a folder that both sides open."""
    import torch

    from conditioning.clip import ClipText, ClipTextConfig, ClipTextEncoder
    from conditioning.tokenizer import ClipTokenizer
    from ldm.unet import UNet, UNetConfig
    from pipelines.defaults import Defaults
    from pipelines.folder import Model, save_model, scheduler_config
    from vae.autoencoder import Autoencoder, AutoencoderConfig

    torch.manual_seed(0)
    tokenizer = ClipTokenizer.train([PROMPT], 600, length=77)
    text = ClipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.prefix[0],
        eos_token_id=tokenizer.suffix[0],
        pad_token_id=tokenizer.pad,
    )
    unet = UNetConfig(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=256,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    vae = AutoencoderConfig(block_out_channels=(32, 64, 96, 128), norm_num_groups=16, sample_size=128)
    encoder = ClipTextEncoder(ClipText(text), tokenizer)
    model = Model(UNet(unet), Autoencoder(vae), encoder, scheduler_config("scaled_linear", "epsilon"), Defaults())
    model.defaults = replace(model.defaults, size=128)
    save_model(model, folder)
    for name, part in (("U-Net", model.unet), ("autoencoder", model.vae), ("text encoder", encoder)):
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.1f} M parameters")
    return folder


def cold(script: str) -> float:
    """Seconds from process start to its end."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tempfile.gettempdir())
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return seconds


class Warm:
    """A process that paints when it is told to."""

    def __init__(self, script: str):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tempfile.gettempdir()}
        self.process = subprocess.Popen([sys.executable, "-c", script], **pipes)
        self._answer()

    def seconds(self, pictures: int) -> float:
        self.process.stdin.write(f"{pictures}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        while line and not line.startswith(("ready", *"0123456789")):  # what libraries print
            line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a side ended with exit status {self.process.wait()}: what it said is above")
        return line

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = config.model.resolve() if config.model else random_peer(Path(scratch) / "peer")
        values = {
            "root": str(ROOT),
            "model": str(folder),
            "device": config.device,
            "dtype": "torch.float32" if config.device == "cpu" else "torch.bfloat16",
            "prompt": PROMPT,
            "steps": config.steps,
            "out": str(Path(scratch) / "picture.png"),
        }
        sides = {"atelier": OURS, "diffusers": THEIRS}
        kinds = ("cold", "warm", "batch")
        figures: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in sides}
        for _ in range(config.repeats):
            for name, script in sides.items():  # in turns, so that a busy minute hits both
                figures[name]["cold"].append(cold((script + COLD).format(**values)))
        waiting = {name: Warm((script + WARM).format(**values)) for name, script in sides.items()}
        for kind, pictures in (("warm", 1), ("batch", 8)):
            for _ in range(config.repeats):
                for name, side in waiting.items():
                    figures[name][kind].append(side.seconds(pictures))
        for side in waiting.values():
            side.end()
    medians = {name: {k: statistics.median(v) for k, v in side.items()} for name, side in figures.items()}
    print(f"{described()}, {config.device}, {config.steps} steps, medians in seconds")
    print(f"{'':<28}{'atelier':>10}{'diffusers':>11}{'ratio':>8}")
    rows = {"cold": "start to first picture", "warm": "the same, warm", "batch": "batch of 8, warm"}
    for key, label in rows.items():
        ours, theirs = medians["atelier"][key], medians["diffusers"][key]
        print(f"{label:<28}{ours:>10.2f}{theirs:>11.2f}{theirs / ours:>8.2f}")
    if config.out:
        settings = {"steps": config.steps, "device": config.device, "dtype": values["dtype"]}
        settings["model"] = str(config.model or "random weights")
        told = {"machine": described(), "settings": settings, "seconds": figures}
        config.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
