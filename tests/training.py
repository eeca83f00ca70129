"""What the tests of training share beside the fixtures `pixels` and `latents`: a look at what a run left, its end."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import train.ldm
from ldm.unet import UNetConfig
from pipelines import TextToImagePipeline
from pipelines.files import checkpoints

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "purple", "orange")
UNET = UNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=2,
    norm_num_groups=8,
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1] / "unet" / "diffusion_pytorch_model.safetensors")


def state(run: Path) -> dict:
    return torch.load(checkpoints(run)[-1] / "training" / "state.pt", weights_only=True)


def paint(run: Path, prompt: str = "a red square", **call) -> np.ndarray:
    pipe = TextToImagePipeline.from_pretrained(run, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(prompt, seed=0, **call).images[0], np.float32)


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    rate = train.ldm.learning_rate

    def killing(update: int, **kwargs) -> float:
        if update == at:
            raise Killed
        return rate(update, **kwargs)

    monkeypatch.setattr(train.ldm, "learning_rate", killing)


def poison(monkeypatch: pytest.MonkeyPatch, at: int, weight_of: Callable[[Accelerator], torch.nn.Parameter]) -> None:
    """In the `at`-th backward pass a weight's gradient becomes no number."""
    backward, passes = Accelerator.backward, itertools.count(1)

    def poisoned(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> None:
        backward(self, loss, **kwargs)
        if next(passes) == at:
            weight_of(self).grad.fill_(float("nan"))  # type: ignore[union-attr]

    monkeypatch.setattr(Accelerator, "backward", poisoned)
