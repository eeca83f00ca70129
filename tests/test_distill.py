"""Distillation: a student paints in one step what its teacher needs many for, and is a model folder like any other."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import train.ldm
from conditioning.context import Context
from ldm.guidance import classifier_free
from pipelines import TextToImagePipeline
from pipelines.files import read_json, write_json
from pipelines.folder import load_model
from tests.conftest import tiny_text_encoder
from tests.training import COLOURS, Killed, kill_at, state
from train.distill import PRESETS, Config, distilling, layout_of, main, unconditional
from train.settings import Config as Settings
from train.texts import Texts

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def teacher(pixels: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher")
    learnt = {"updates": 300, "batch_size": 16, "learning_rate": 8e-3, "warmup": 10, "ema_decay": 0.98}
    return train.ldm.main(replace(pixels, output=output, steps=10, guidance_scale=1.5, checkpoint_every=300, **learnt))


@pytest.fixture(scope="module")
def config(pixels: Settings, teacher: Path) -> Config:
    data = {name: getattr(pixels, name) for name in ("data", "cache", "workers", "prompts")}
    return replace(
        PRESETS["student"], model=str(teacher), updates=4, batch_size=8, warmup=1, checkpoint_every=2, **data
    )


def error(folder: Path, **call) -> float:
    """Mean distance of the painted colours from those that were asked for, in grey levels."""
    pipe = TextToImagePipeline.from_pretrained(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    painted = pipe([f"a {colour} square" for colour in COLOURS], seed=0, **call).images
    known = np.stack([np.asarray(Image.new("RGB", (8, 8), colour), np.float32) for colour in COLOURS])
    return float(np.abs(np.stack([np.asarray(image, np.float32) for image in painted]) - known).mean())


@pytest.mark.slow
def test_one_step_without_guidance_paints_what_many_with_it_do(config: Config, teacher: Path, tmp_path: Path) -> None:
    job = replace(config, output=tmp_path, steps=1, updates=200, batch_size=16, learning_rate=4e-3, ema_decay=0.95)
    student = main(replace(job, warmup=10, checkpoint_every=200))
    alone, before = error(student), error(teacher, sampler="ddim", spacing="trailing", steps=1, guidance_scale=1)
    assert alone < 0.75 * before
    assert alone < 1.3 * error(teacher)


def test_what_is_saved_says_how_it_is_sampled_and_diffusers_paints_the_same(
    model_folder: Path, config: Config, tmp_path: Path
) -> None:
    student = main(replace(config, model=str(model_folder), output=tmp_path, updates=2, steps=3))
    defaults = load_model(student).defaults
    assert (defaults.steps, defaults.guidance_scale, defaults.sampler) == (3, 1.0, "ddim")
    theirs = StableDiffusionPipeline.from_pretrained(
        next(tmp_path.glob("checkpoint-*")), safety_checker=None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    assert theirs.scheduler.config.timestep_spacing == "trailing"
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    call = {"output_type": "np", "latents": latents}
    expected = theirs("a red circle", num_inference_steps=3, guidance_scale=1.0, **call).images
    ours = TextToImagePipeline.from_pretrained(student, device="cpu")
    np.testing.assert_allclose(ours("a red circle", **call).images, expected, atol=2e-3)


def test_a_student_may_be_a_small_file_that_says_how_it_is_sampled(
    model_folder: Path, config: Config, tmp_path: Path
) -> None:
    targets = ("conv1", "conv2", "to_q", "to_out.0")
    job = replace(config, model=str(model_folder), output=tmp_path, updates=2, steps=3, warmup=1, learning_rate=0.1)
    main(replace(job, lora_rank=2, lora_targets=targets))
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    before, scheduler = pipe.model.defaults, pipe.model.scheduler
    call = {"output_type": "np", "latents": torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))}
    plain = pipe("a red circle", **call).images

    alone = shutil.copy(next(tmp_path.glob("checkpoint-*/*.safetensors")), tmp_path / "one-file.safetensors")
    pipe.load_lora(alone)
    defaults = pipe.model.defaults
    assert (defaults.steps, defaults.guidance_scale, defaults.sampler) == (3, 1.0, "ddim")
    assert pipe.model.scheduler["timestep_spacing"] == "trailing"
    said = {"steps": 3, "guidance_scale": 1.0, "sampler": "ddim", "spacing": "trailing"}
    fast = pipe("a red circle", **call).images
    np.testing.assert_array_equal(fast, pipe("a red circle", **said, **call).images)

    pipe.set_lora(alone, 0.0)  # without it, its steps would be too few
    assert pipe.model.defaults == before
    pipe.set_lora(alone, 1.0)
    np.testing.assert_array_equal(fast, pipe("a red circle", **call).images)
    pipe.unload_loras()
    assert (pipe.model.defaults, pipe.model.scheduler) == (before, scheduler)
    pipe.model.defaults = replace(before, steps=7)  # one's own wishes are not undone by what says nothing of them
    pipe.unload_loras()
    assert pipe.model.defaults.steps == 7
    pipe.model.defaults = before
    np.testing.assert_array_equal(plain, pipe("a red circle", **call).images)


def test_a_killed_distillation_ends_the_same(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = state(main(replace(config, output=tmp_path / "whole")))
    job = replace(config, output=tmp_path / "killed")
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            main(job)
    again = state(main(job))
    assert all(weight.equal(again["weights"][name]) for name, weight in whole["weights"].items())


def test_the_null_is_as_long_as_captions_that_nobody_foresaw() -> None:
    """Those of a stream, of which the first ones alone are known when training begins."""
    encoder = tiny_text_encoder()
    texts = Texts(encoder, [("a fox",)], torch.device("cpu"))
    told = texts(["a fox", "a red circle on a blue background " * 5])
    windows = told["encoder_hidden_states"].shape[1] // encoder.length
    assert windows > 1
    null = unconditional(texts, told, 2)
    torch.testing.assert_close(null, encoder([""] * 2, chunks=windows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interval", [None, (0.5, 3.0)])
@pytest.mark.parametrize(("asked", "scale"), [(None, 3.0), (1.0, 1.0), (7.0, 7.0)])
def test_the_teacher_is_guided_as_it_was_asked_for(
    model_folder: Path, config: Config, tmp_path: Path, asked: float | None, scale: float, interval: tuple | None
) -> None:
    """By default at its own scale, and in its own interval in any case."""
    teacher = shutil.copytree(model_folder, tmp_path / "teacher")
    write_json(teacher / "atelier.json", read_json(teacher / "atelier.json") | {"guidance_interval": interval})
    student = load_model(teacher)
    goal = distilling(replace(config, model=str(teacher), teacher_guidance=asked))(student, config, student.conditioner)
    draw = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(3, 4, 4, 4, generator=draw), torch.tensor([0.2, 1.0, 9.0])
    told, null = student.conditioner(["a fox", "a red square", "blue"]), student.conditioner([""] * 3)
    wanted = classifier_free(load_model(teacher).denoiser, told, null, scale, interval=interval)(x, sigma)
    torch.testing.assert_close(goal.loss.teacher(x, sigma, told), wanted, atol=1e-5, rtol=1e-4)


def test_the_null_is_told_of_what_is_no_text() -> None:
    def contexts(captions: list[str]) -> Context:
        n = len(captions)
        added = {"text_embeds": torch.zeros(n, 2), "time_ids": torch.zeros(n, 6)}
        return {"encoder_hidden_states": torch.zeros(n, 5, 4), "added_cond_kwargs": added}

    sizes, shown = torch.rand(3, 6), torch.rand(3, 5, 8, 8)
    told = {"added_cond_kwargs": {"text_embeds": torch.ones(3, 2), "time_ids": sizes}, "concat": shown}
    null = unconditional(contexts, {"encoder_hidden_states": torch.ones(3, 5, 4), **told}, 3)
    assert not null["encoder_hidden_states"].any()
    assert not null["added_cond_kwargs"]["text_embeds"].any()
    assert null["added_cond_kwargs"]["time_ids"] is sizes
    assert null["concat"] is shown


@pytest.mark.parametrize("settings", [{"path": "flow", "prediction": "velocity"}, {"path": "edm", "prediction": "edm"}])
def test_students_on_other_paths_and_of_labels(
    settings: dict, config: Config, pixels: Settings, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """What has no beta table is saved for Atelier alone, with the teacher's own scheduler, and says nothing odd."""
    job = {"updates": 2, "warmup": 1, "checkpoint_every": 2, "text_encoder": "labels", **settings}
    teacher = train.ldm.main(replace(pixels, output=tmp_path / "teacher", **job))
    student = main(replace(config, data="", model=str(teacher), output=tmp_path / "student", steps=2, updates=2))
    theirs, ours = load_model(teacher).scheduler, load_model(student).scheduler
    assert ours == theirs | {"timestep_spacing": "trailing"}
    pipe = TextToImagePipeline.from_pretrained(student, device="cpu")
    assert np.isfinite(pipe("a red square", output_type="np").images).all()
    assert not [str(w.message) for w in recwarn if "scheduler" in str(w.message)]


def test_a_student_sees_what_its_teacher_saw(
    model_folder: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    notes = read_json(folder / "atelier.json")
    write_json(folder / "atelier.json", {**notes, "data": "pictograms:fox", "views": 3})
    seen = []
    monkeypatch.setattr(train.ldm, "main", lambda config, objective: seen.append((config.data, config.views)))
    main(replace(config, data="", model=str(folder), output=tmp_path / "run"))
    assert seen == [("pictograms:fox", 3)]


def test_the_teacher_is_laid_out_as_its_student() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 1))
    assert layout_of(network) == torch.contiguous_format
    assert layout_of(network.to(memory_format=torch.channels_last)) == torch.channels_last  # type: ignore[call-overload]


def test_a_teacher_of_unknown_data_is_asked_about(model_folder: Path, config: Config, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")  # as another tool leaves one
    (folder / "atelier.json").unlink()
    with pytest.raises(ValueError, match="does not say what it was trained on: give --data"):
        main(replace(config, data="", model=str(folder), output=tmp_path / "run"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": ""}, "--model is missing"),
        ({"steps": None}, "--steps is missing"),
        ({"substeps": 0}, "--substeps is 0"),
        ({"token": "<x>"}, "by its U-Net alone"),
        ({"sampler": "heun"}, "--sampler ddim --guidance-scale 1"),
        ({"guidance_scale": 3.0}, "--sampler ddim --guidance-scale 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(PRESETS["student"], **settings)


def test_settings_of_another_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="leave out --noise-mean, --weight, --perturbation"):
        main(replace(PRESETS["student"], noise_mean=1.0, weight="min_snr", perturbation=0.1))
