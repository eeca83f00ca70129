"""Adapters, words, masks and priors: what is added to a model that can paint, and only that, is learnt and kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines import TextToImagePipeline
from pipelines.files import checkpoints
from pipelines.folder import load_model
from tests.training import Killed, kill_at, state
from train.ldm import main
from train.settings import Config

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def tuning(latents: Config, model_folder: Path) -> Config:
    """Fine-tuning a whole tiny model."""
    own = {name: getattr(Config(), name) for name in ("unet", "vae", "text_encoder", "guidance_scale")}
    return replace(latents, model=str(model_folder), size=None, optimizer="adamw", learning_rate=1e-2, **own)


def painted(pipe: TextToImagePipeline, prompt: str = "a red square", **call) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(prompt, seed=0, steps=4, **call).images[0], np.float32)


def test_adapters_alone_learn_and_paint_as_they_did_in_training(
    tuning: Config, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tuning, train=("unet", "text_encoder"), lora_rank=2, lora_alpha=4, learning_rate=0.1)
    config = replace(config, updates=4, checkpoint_every=2)
    run = main(replace(config, output=tmp_path / "whole"))
    folder = checkpoints(run)[-1]
    assert sorted(f.name for f in folder.iterdir()) == ["atelier.json", "pytorch_lora_weights.safetensors", "training"]
    learnt = state(run)["weights"]
    assert {name.split(".")[0] for name in learnt} == {"unet", "text_encoder"}
    assert all("lora_" in name for name in learnt)

    # The sample grid was painted through peft; a pipeline that merges the file paints the same.
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    before = painted(pipe)
    pipe.load_lora(folder)
    after = painted(pipe)
    assert np.abs(after - before).max() > 5
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    theirs.load_lora_weights(folder)
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": start}
    wanted = theirs("a red square", height=16, width=16, **call).images[0]
    ours = pipe("a red square", sampler="ddim", **call).images[0]
    assert np.abs(np.asarray(ours, np.float32) - np.asarray(wanted, np.float32)).max() <= 2

    kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        main(replace(config, output=tmp_path / "killed"))
    monkeypatch.undo()
    again = main(replace(config, output=tmp_path / "killed"))
    file = "pytorch_lora_weights.safetensors"
    assert (checkpoints(again)[-1] / file).read_bytes() == (folder / file).read_bytes()
    assert all(weight.equal(learnt[name]) for name, weight in state(again)["weights"].items())


def test_the_text_encoder_learns_beside_the_unet_or_alone(tuning: Config, model_folder: Path, tmp_path: Path) -> None:
    before = load_model(model_folder)
    for networks in (("text_encoder",), ("unet", "text_encoder")):
        run = main(replace(tuning, train=networks, output=tmp_path / "-".join(networks)))
        after = load_model(run)
        moved = {
            "unet": any((a != b).any() for a, b in zip(before.unet.parameters(), after.unet.parameters(), strict=True)),
            "text_encoder": any(
                (a != b).any()
                for a, b in zip(before.conditioner.parameters(), after.conditioner.parameters(), strict=True)
            ),
        }
        assert moved == {name: name in networks for name in moved}
        again = main(replace(tuning, train=networks, output=tmp_path / "-".join(networks), updates=3))
        assert state(again)["update"] == 3


def test_a_word_is_learnt_and_nothing_else(
    tuning: Config, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), "red").save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("a <fox> square")
    config = replace(
        tuning, data=str(data), token="<fox>", token_from="green", token_vectors=2, updates=4, checkpoint_every=2
    )
    run = main(replace(config, output=tmp_path / "whole"))
    folder = checkpoints(run)[-1]
    assert sorted(f.name for f in folder.iterdir()) == ["atelier.json", "learned_embeds.safetensors", "training"]
    learnt = load_file(folder / "learned_embeds.safetensors")
    assert list(learnt) == ["<fox>"]
    assert learnt["<fox>"].shape == (2, 32)
    assert len(state(run)["weights"]) == 1

    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    before = pipe.model.conditioner(["a green green square", "a <fox> square"])["encoder_hidden_states"]
    pipe.load_embedding(folder)
    after = pipe.model.conditioner(["a green green square", "a <fox> square"])["encoder_hidden_states"]
    torch.testing.assert_close(after[0], before[0], atol=1e-6, rtol=0)
    moved = (after[1] - before[0]).abs().max()  # it began as "green", twice
    assert 1e-3 < moved < (after[1] - before[1]).abs().max()

    kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        main(replace(config, output=tmp_path / "killed"))
    monkeypatch.undo()
    again = load_file(checkpoints(main(replace(config, output=tmp_path / "killed")))[-1] / "learned_embeds.safetensors")
    assert again["<fox>"].equal(learnt["<fox>"])
    with pytest.raises(ValueError, match=r"--token '<dog>' is in no caption, for instance 'a <fox> square'"):
        main(replace(config, token="<dog>", output=tmp_path / "other"))


def test_an_inpainting_model_grows_out_of_any(tuning: Config, model_folder: Path, tmp_path: Path) -> None:
    config = replace(tuning, inpainting=True, learning_rate=1e-3)
    run = main(replace(config, output=tmp_path / "run"))
    model, before = load_model(run), load_model(model_folder)
    assert model.inpaints
    assert model.unet.conv_in.weight.shape[1] == 9
    assert model.unet.conv_in.weight[:, 4:].abs().max() > 0  # what it is shown counts
    torch.testing.assert_close(model.unet.conv_in.weight[:, :4], before.unet.conv_in.weight, atol=1e-2, rtol=0)
    assert state(main(replace(config, output=tmp_path / "run", updates=3)))["update"] == 3
    picture, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    pipe = TextToImagePipeline.from_pretrained(run, device="cpu")
    assert painted(pipe, image=picture, mask=mask).shape == (16, 16, 3)


def test_the_prior_is_painted_once_and_is_half_of_what_is_seen(
    tuning: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.ldm

    seen = []
    drawn = train.ldm.draw_batch
    monkeypatch.setattr(train.ldm, "draw_batch", lambda *a, **kw: seen.append(drawn(*a, **kw)) or seen[-1])
    config = replace(
        tuning, output=tmp_path, prior=("a square",), prior_pictures=4, prior_weight=0.25, caption_dropout=0.0
    )
    main(replace(config, updates=8))
    files = sorted((tmp_path / "prior").glob("*.png"))
    assert len(files) == 4
    told = [caption for batch in seen[1:] for caption in batch.captions]
    assert told.count("a square") == len(told) / 2
    weights = [float(w) for batch in seen[1:] for w in batch.weight]
    assert weights == [0.25 if caption == "a square" else 1.0 for caption in told]
    times = [f.stat().st_mtime_ns for f in files]
    main(replace(config, updates=9))
    assert [f.stat().st_mtime_ns for f in files] == times
    files[0].with_suffix(".txt").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 4 pictures"):
        main(replace(config, updates=10))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": ("text_encoder",), "text_encoder": "labels", "model": "", "vae": "none"}, "not by CLIP"),
        ({"lora_rank": 4, "lora_targets": ("to_q", "to_w")}, r"--lora-targets to_w: no layer .* end in .*to_q"),
        ({"lora_rank": 4, "train": ("unet",), "lora_targets": ("q_proj",)}, r"--lora-targets q_proj"),
        (
            {"lora_rank": 4, "train": ("unet", "text_encoder"), "lora_targets": ("to_q",)},
            r"--lora-targets to_q: no layer of text_encoder is called so; names there end in .*q_proj",
        ),
        ({"inpainting": True, "model": "", "vae": "none", "size": 8}, "in the latents of an autoencoder"),
    ],
)
def test_additions_that_fit_nothing_are_refused(
    tuning: Config, latents: Config, tmp_path: Path, settings: dict, words: str
) -> None:
    base = latents if settings.get("model") == "" else tuning
    with pytest.raises(ValueError, match=words):
        main(replace(base, output=tmp_path, **settings))
    assert not checkpoints(tmp_path)
