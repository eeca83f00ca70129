"""Training in SDXL's layout: sizes reach the network, both text encoders learn, and what is learnt is painted with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train.ldm
from pipelines import TextToImagePipeline
from pipelines.files import checkpoints
from pipelines.folder import load_model
from tests.training import Killed, kill_at, state
from train.ldm import main
from train.settings import Config

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def tuning(pixels: Config, xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("wide")
    for i, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (48, 32), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} <fox>")
    own = {name: getattr(Config(), name) for name in ("unet", "vae", "text_encoder", "guidance_scale")}
    size = load_model(xl_folder).size
    settings = {"model": str(xl_folder), "data": str(folder), "size": size, "optimizer": "adamw", "learning_rate": 1e-2}
    return replace(pixels, **settings, **own)


def test_the_network_is_told_the_sizes_of_the_data(
    tuning: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    forward = train.ldm.Learner.forward

    def seen(self, x0, captions, sizes, sigma, noise, beside, **options):
        hook = self.denoiser.network.register_forward_pre_hook(
            lambda network, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
        )
        try:
            return forward(self, x0, captions, sizes, sigma, noise, beside, **options)
        finally:
            hook.remove()

    monkeypatch.setattr(train.ldm.Learner, "forward", seen)
    run = main(replace(tuning, output=tmp_path))
    side = tuning.size
    crop = round((48 * side / 32 - side) / 2)  # of the picture resized to that height
    assert all(row == [32, 48, 0, crop, side, side] for ids in told for row in ids.tolist())
    assert load_model(run).xl
    assert load_model(run).conditioner.size == side


def test_adapters_of_both_text_encoders(
    tuning: Config, xl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tuning, train=("unet", "text_encoder"), lora_rank=2, learning_rate=0.1, updates=4)
    run = main(replace(config, output=tmp_path / "whole", checkpoint_every=2))
    learnt = state(run)["weights"]
    assert {name.split(".")[0] for name in learnt} == {"unet", "text_encoder", "text_encoder_2"}
    moved = {name.split(".")[0] for name, weight in learnt.items() if "lora_B" in name and weight.abs().max() > 0}
    assert moved == {"unet", "text_encoder", "text_encoder_2"}
    pipe = TextToImagePipeline.from_pretrained(xl_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    call: dict = {"seed": 0, "steps": 2, "output_type": "np"}
    before = pipe("a red square", **call).images
    pipe.load_lora(checkpoints(run)[-1])
    assert np.abs(pipe("a red square", **call).images - before).max() > 1e-3
    kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        main(replace(config, output=tmp_path / "killed", checkpoint_every=2))
    monkeypatch.undo()
    again = state(main(replace(config, output=tmp_path / "killed", checkpoint_every=2)))["weights"]
    assert all(weight.equal(learnt[name]) for name, weight in again.items())


def test_a_word_for_both_text_encoders(tuning: Config, xl_folder: Path, tmp_path: Path) -> None:
    config = replace(tuning, token="<fox>", token_vectors=2, output=tmp_path, updates=3)
    run = main(config)
    assert len(state(run)["weights"]) == 2
    assert state(main(replace(config, updates=4)))["update"] == 4
    pipe = TextToImagePipeline.from_pretrained(xl_folder, device="cpu")
    pipe.load_embedding(checkpoints(run)[-1], "<fox>")
    for encoder in (pipe.model.conditioner.first, pipe.model.conditioner.second):
        assert len(encoder.clip_tokenizer.encode("<fox>")) == 2


def test_a_new_unet_for_two_text_encoders(tuning: Config, pixels: Config, xl_folder: Path, tmp_path: Path) -> None:
    config = replace(tuning, model="", vae="none", text_encoder=str(xl_folder), unet=pixels.unet, size=8)
    run = main(replace(config, output=tmp_path))
    model = load_model(run)
    assert model.unet.config.addition_embed_type == "text_time"
    pipe = TextToImagePipeline(model)
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(pipe("a red square", steps=2, seed=0, output_type="pt").images).all()
