"""A whole tiny model of random weights, and pictures on the disk: what tests of the rooms above need."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Several processes of pytest-xdist share the cores; what is started from here asks for its threads by the same name.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
import torch
from PIL import Image

from conditioning.clip import ClipText, ClipTextConfig, ClipTextEncoder
from conditioning.tokenizer import ClipTokenizer
from ldm.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline
from pipelines.defaults import Defaults
from pipelines.folder import Model, save_model, scheduler_config
from vae.autoencoder import Autoencoder, AutoencoderConfig

CAPTIONS = ["a red circle on a blue background", "a green square on a white background", "an oil painting of a fox"]


def tiny_text_encoder() -> ClipTextEncoder:
    torch.manual_seed(1)
    tokenizer = ClipTokenizer.train(CAPTIONS * 4, size=600, length=16)
    tower = ClipText(
        ClipTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.prefix[0],
            eos_token_id=tokenizer.suffix[0],
            pad_token_id=tokenizer.pad,
        )
    )
    return ClipTextEncoder(tower.eval().requires_grad_(False), tokenizer)


def tiny_model(path: str = "scaled_linear", prediction: str = "epsilon") -> Model:
    """4×4×4 latents of 16×16 pictures, widths 16 and 32: a fraction of a second for a picture."""
    torch.manual_seed(0)
    unet = UNet(
        UNetConfig(
            sample_size=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        )
    )
    vae = Autoencoder(
        AutoencoderConfig(block_out_channels=(8, 8, 16), latent_channels=4, norm_num_groups=4, sample_size=16)
    )
    for network in (unet, vae):
        network.eval().requires_grad_(False)
    defaults = Defaults(steps=4, guidance_scale=3.0, caption_dropout=0.1, data="random weights")
    return Model(unet, vae, tiny_text_encoder(), scheduler_config(path, prediction), defaults)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_model(), folder)
    return folder


@pytest.fixture
def pipe(model_folder: Path) -> TextToImagePipeline:
    """A new one for each test, which may change it."""
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.sdxl import their_pipeline

    folder = tmp_path_factory.mktemp("xl")
    their_pipeline(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Eight captioned pictures of one colour each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for i, colour in enumerate(("red", "green", "blue", "white", "black", "yellow", "purple", "orange")):
        Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {colour} square"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """For trainings inside the test's own process: on the CPU, in one thread, and no trace left to the next module."""
    from accelerate.state import AcceleratorState

    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(torch, "set_num_threads", lambda threads: None)  # the scripts take all cores
        yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of one colour each; two captions say which."""
    from tests.training import COLOURS

    folder = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} square\n{colour}\n")
    return folder


@pytest.fixture(scope="module")
def pixels(pictures: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings of a run of a few updates in pixel space."""
    from tests.training import UNET
    from train.settings import Config

    return Config(
        data=str(pictures),
        output=tmp_path_factory.mktemp("unused"),
        cache=tmp_path_factory.mktemp("cache"),
        vae="none",
        text_encoder=str(model_folder),
        unet=UNET,
        size=8,
        updates=2,
        batch_size=4,
        warmup=1,
        checkpoint_every=1000,
        prompts=("a red square",),
        steps=2,
        workers=0,
    )


@pytest.fixture(scope="module")
def latents(pixels: Any, model_folder: Path) -> Any:
    """The same in the latents of an autoencoder."""
    return replace(pixels, vae=str(model_folder), size=16)


@pytest.fixture
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets copies what it reads: not into the home of whoever runs the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
