"""What the pipeline promises to its callers."""

import copy
import gc
import itertools
import json
import pickle
import shutil
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from pipelines import TextToImagePipeline
from pipelines.device import as_many_as_fit, exact_float32
from pipelines.folder import load_model

PROMPTS = ["a red circle on a blue background", "an oil painting of a fox"]


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def test_seed_gives_the_same_picture_alone_and_in_a_batch(pipe: TextToImagePipeline) -> None:
    batch = pipe(PROMPTS, seed=7, sampler="ddpm", output_type="np")
    assert batch.seeds == [7, 8]
    alone = pipe(PROMPTS[1], seed=8, sampler="ddpm", output_type="np")
    assert np.allclose(batch.images[1], alone.images[0], atol=1e-4)
    assert not np.allclose(batch.images[0], alone.images[0], atol=1e-2)


@pytest.mark.parametrize("negatives", [None, ["blue", "a green square " * 30]])
def test_a_long_prompt_changes_no_picture_beside_it(pipe: TextToImagePipeline, negatives: list[str] | None) -> None:
    prompts = ["a fox", "a red circle on a blue background " * 8]
    call = {"steps": 2, "output_type": "pt", "guidance_scale": 4.0}
    both = pipe(prompts, seed=5, negative_prompt=negatives, **call).images
    for i, prompt in enumerate(prompts):
        negative = negatives[i] if negatives else None
        alone = pipe(prompt, seed=5 + i, negative_prompt=negative, **call).images
        torch.testing.assert_close(both[i], alone[0], atol=1e-4, rtol=1e-4)


def test_output_types_and_counts(pipe: TextToImagePipeline) -> None:
    assert len(pipe(PROMPTS, num_images_per_prompt=2, steps=1).images) == 4
    assert pipe(PROMPTS[0], output_type="np", steps=1).images.shape == (1, 16, 16, 3)
    assert pipe(PROMPTS[0], output_type="pt", steps=1, height=20, width=24).images.shape == (1, 3, 20, 24)
    assert pipe(PROMPTS[0], output_type="latent", steps=1).images.shape == (1, 4, 4, 4)
    for kind in ("pt", "latent"):  # a caller's own, to be changed and learnt from
        pipe(PROMPTS[0], output_type=kind, steps=1).images.mul_(2).requires_grad_().square().sum().backward()
    images, _ = pipe(PROMPTS[0], steps=1, return_dict=False)
    assert images[0].size == (16, 16)


def test_saved_png_carries_prompt_seed_and_settings(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    call = {"sampler": "ddim", "spacing": "karras", "eta": 0.5, "guidance_scale": 2.0, "guidance_rescale": 0.3}
    call |= {"guidance_interval": (0.1, 8.0), "clip_skip": 1, "height": 20}
    image = pipe("ein Öl-Fuchs", seed=11, steps=2, negative_prompt="grey", **call).images[0]
    image.save(tmp_path / "fox.png")
    with Image.open(tmp_path / "fox.png") as opened:
        text = opened.text  # type: ignore[attr-defined]
        assert (np.asarray(opened) == np.asarray(image)).all()
    assert (text["prompt"], text["seed"]) == ("ein Öl-Fuchs", "11")
    settings = json.loads(text["atelier"])
    assert settings["negative_prompt"] == "grey"
    wanted = {"steps": 2, "sampler": "ddim", "spacing": "karras", "eta": 0.5, "guidance_scale": 2.0, "clip_skip": 1}
    wanted |= {"guidance_rescale": 0.3, "guidance_interval": [0.1, 8.0], "width": 16, "height": 20}
    assert wanted.items() <= settings.items()
    assert settings["model"] == pipe.source
    assert Path(pipe.source).is_dir()
    with open(tmp_path / "open.png", "wb") as file:
        image.save(file)
    assert Image.open(tmp_path / "open.png").text == text
    image.save(tmp_path / "fox.jpg")  # other formats are as PIL has them


def test_copies_of_a_picture_carry_its_settings(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    image = pipe(PROMPTS[0], steps=1, seed=3).images[0]
    for copied in (copy.deepcopy(image), pickle.loads(pickle.dumps(image))):
        assert np.array_equal(pixels(copied), pixels(image))
        copied.save(tmp_path / "copy.png")
        with Image.open(tmp_path / "copy.png") as saved:
            assert saved.info["seed"] == "3"


def test_negative_prompt_and_guidance_change_the_picture(pipe: TextToImagePipeline) -> None:
    plain = pixels(pipe(PROMPTS[0], seed=1, guidance_scale=3.0).images[0])
    assert np.abs(plain - pixels(pipe(PROMPTS[0], seed=1, guidance_scale=1.0).images[0])).max() > 0
    assert np.abs(plain - pixels(pipe(PROMPTS[0], seed=1, negative_prompt="a fox").images[0])).max() > 0


def test_a_list_of_negative_prompts_is_one_for_each_prompt(pipe: TextToImagePipeline) -> None:
    call = {"steps": 2, "output_type": "pt", "guidance_scale": 4.0}
    group = pipe(PROMPTS, negative_prompt=["a fox", "blue"], num_images_per_prompt=2, seed=5, **call).images
    for i, (prompt, negative) in enumerate(zip(PROMPTS, ("a fox", "blue"), strict=True)):
        alone = pipe(prompt, negative_prompt=negative, seed=5 + 2 * i, **call).images
        torch.testing.assert_close(group[2 * i], alone[0], atol=1e-4, rtol=1e-4)
    one = pipe(PROMPTS, negative_prompt=["a fox"], num_images_per_prompt=2, seed=5, **call).images
    assert one.equal(pipe(PROMPTS, negative_prompt="a fox", num_images_per_prompt=2, seed=5, **call).images)


def test_eta_reaches_ddim(pipe: TextToImagePipeline) -> None:
    """At 1 it is DDPM with the small variance (arXiv:2010.02502, equation 16)."""
    call = {"seed": 1, "steps": 6, "spacing": "trailing", "output_type": "pt"}
    ddpm = pipe(PROMPTS[0], sampler="ddpm", variance="small", **call).images
    torch.testing.assert_close(pipe(PROMPTS[0], sampler="ddim", eta=1.0, **call).images, ddpm, atol=1e-3, rtol=1e-3)
    assert (pipe(PROMPTS[0], sampler="ddim", eta=0.0, **call).images - ddpm).abs().max() > 0.01


def test_clip_skip_is_of_one_call(pipe: TextToImagePipeline, xl_folder: Path) -> None:
    xl = TextToImagePipeline.from_pretrained(xl_folder, device="cpu")
    xl.set_progress_bar_config(disable=True)
    for pipeline in (pipe, xl):
        conditioner = pipeline.model.conditioner
        call = {"seed": 1, "steps": 2, "output_type": "pt"}
        plain, skipped = (pipeline(PROMPTS[0], clip_skip=skip, **call).images for skip in (None, 1))
        assert not torch.allclose(plain, skipped, atol=1e-4)
        assert pipeline(PROMPTS[0], **call).images.equal(plain)  # it is as it was
        before, conditioner.clip_skip = conditioner.clip_skip, 1
        assert pipeline(PROMPTS[0], **call).images.equal(skipped)
        conditioner.clip_skip = before


def test_a_call_within_another_changes_nothing_of_it(pipe: TextToImagePipeline) -> None:
    call: dict[str, Any] = {"clip_skip": 1, "seed": 1, "steps": 3, "output_type": "pt"}
    alone, conditioner = pipe(PROMPTS[0], **call).images, pipe.model.conditioner
    seen = []
    hook = conditioner.tower.register_forward_hook(lambda *_: seen.append(conditioner.clip_skip))
    within = pipe(PROMPTS[0], **call, callback=lambda *_: pipe(PROMPTS[1], steps=1, clip_skip=2, output_type="latent"))
    hook.remove()
    assert within.images.equal(alone)
    assert set(seen) == {0}  # a call's own is handed on, not set where other threads would see it


def test_a_pipeline_that_nobody_has_is_gone(model_folder: Path) -> None:
    gc.disable()  # which would find cycles, but late, with a GPU's memory full
    try:
        pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
        unet = weakref.ref(pipe.model.unet)
        del pipe
        assert unet() is None
    finally:
        gc.enable()


def test_pictures_have_the_sides_that_the_network_was_trained_on(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "wide")
    file = tmp_path / "wide" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": [4, 6]}))
    notes = tmp_path / "wide" / "atelier.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"size": None}))
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "wide", device="cpu")
    assert pipe(PROMPTS[0], steps=1).images[0].size == (24, 16)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "wide")
    assert theirs(PROMPTS[0], num_inference_steps=1).images[0].size == (24, 16)


def test_a_compiled_network_paints_the_same(model_folder: Path) -> None:
    """What a compiler is given by TorchDynamo is one graph, once for all steps and calls."""
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    call = {"seed": 1, "steps": 3, "output_type": "pt"}
    plain = pipe(PROMPTS[0], **call).images
    torch._dynamo.reset()
    counter = CompileCounter()
    pipe.model.unet.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(pipe(PROMPTS[0], **call).images, plain, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_pictures_are_the_nearest_of_256_levels(pipe: TextToImagePipeline) -> None:
    numbers, image = (pipe(PROMPTS[0], seed=1, steps=2, output_type=kind).images[0] for kind in ("np", "pil"))
    np.testing.assert_array_equal(np.asarray(image), (numbers * 255).round())


def test_callback_sees_every_step(pipe: TextToImagePipeline) -> None:
    seen: list[tuple[int, float]] = []
    pipe(PROMPTS[0], steps=5, callback=lambda i, sigma, x, x0: seen.append((i, sigma)))
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert all(a > b for (_, a), (_, b) in itertools.pairwise(seen))


def test_long_prompts_are_not_cut(pipe: TextToImagePipeline) -> None:
    long = "a red circle on a blue background " * 8
    first = pixels(pipe(long + "a fox", seed=1).images[0])
    assert np.abs(first - pixels(pipe(long + "a green square", seed=1).images[0])).max() > 0


def test_guidance_on_a_model_trained_without_dropout_warns(model_folder: Path) -> None:
    model = load_model(model_folder)
    model.defaults = replace(model.defaults, caption_dropout=0.0)
    with pytest.warns(UserWarning, match="caption dropout"):
        TextToImagePipeline(model)(PROMPTS[0], steps=1, guidance_scale=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextToImagePipeline(model)(PROMPTS[0], steps=1, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": []}, "empty list"),
        ({"prompt": [3]}, "text"),
        ({"prompt": None}, "text"),
        ({"prompt": 5}, "text"),
        ({"height": 0}, "multiples of 4"),
        ({"negative_prompt": 5}, "negative_prompt"),
        ({"height": 17}, "multiples of 4"),
        ({"steps": 0}, "at least one step"),
        ({"steps": -3}, "at least one step"),
        ({"sampler": "magic"}, "dpmpp_2m"),
        ({"steps": 3, "num_inference_steps": 4}, "two names"),
        ({"seed": 1, "generator": torch.Generator()}, "give one"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "shape"),
        ({"output_type": "gif"}, "pil"),
        ({"eta": 0.5, "sampler": "euler"}, "ddim"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"num_images_per_prompt": 2.0}, r"num_images_per_prompt=2.0: expected a whole number"),
        ({"steps": 20.0}, r"steps=20.0: expected a whole number"),
        ({"height": 16.0}, r"height=16.0: expected a whole number"),
        ({"seed": [3, 9]}, r"seed=\[3, 9\]: expected one number.*generator="),
        ({"seed": "7"}, "seed='7': expected a whole number"),
        ({"seed": 2**64}, "expected a number that has 64 bits"),
        ({"generator": 0}, "generator=0: expected a torch.Generator, or a list"),
        ({"generator": [1]}, r"generator=\[1\]: expected"),
        ({"generator": [None]}, r"generator=\[None\]: expected"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: expected a number"),
        ({"guidance_scale": 10**400}, "expected a number"),
        ({"clip_skip": "1"}, "clip_skip='1': expected a whole number"),
        ({"guidance_interval": (5, 1)}, "expected two noise levels"),
        ({"guidance_scale": "3"}, "guidance_scale='3': expected a number"),
        ({"guidance_interval": (1.0,)}, r"guidance_interval=\(1.0,\): expected two noise levels"),
        ({"guidance_interval": 5.0}, "guidance_interval=5.0: expected two noise levels"),
        ({"latents": [1]}, "latents should be a tensor of shape .1, 4, 4, 4., got list"),
        ({"negative_prompt": ["a", "b"]}, "negative"),
        ({"spacing": "odd"}, "spacing"),
        ({"strength": 0.5}, "none was given"),
        ({"negative_prompt": "a tree", "guidance_scale": 1.0}, "belong to guidance"),
        ({"guidance_rescale": 0.5, "guidance_scale": 1.0}, "belong to guidance"),
    ],
)
def test_bad_calls_say_what_to_do(pipe: TextToImagePipeline, arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompt": PROMPTS[0], **arguments})
    with pytest.raises(TypeError):
        pipe(PROMPTS[0], promt="a typo is not swallowed")
    with pytest.raises(TypeError):
        pipe(PROMPTS[0], 16, 16)  # everything but the prompt goes by its name


def test_numbers_of_numpy_are_numbers(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    same = {"seed": 3, "steps": 2, "width": 16, "guidance_scale": 3.0}
    other = {"seed": np.int64(3), "steps": np.int32(2), "width": np.int64(16), "guidance_scale": np.float32(3)}
    one, two = (pipe(PROMPTS[0], **numbers).images[0] for numbers in (same, other))
    assert np.array_equal(np.asarray(one), np.asarray(two))
    two.save(tmp_path / "two.png")
    with Image.open(tmp_path / "two.png") as saved:
        settings = json.loads(saved.text["atelier"])  # type: ignore[attr-defined]
    assert (settings["steps"], settings["guidance_scale"]) == (2, 3.0)


@pytest.mark.parametrize("precision", ["tf32", "none"])
def test_exact_float32_is_of_its_block_alone(precision: str) -> None:
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = precision
        with exact_float32():
            assert [switch.fp32_precision for switch in switches] == ["ieee"] * 2
        assert [switch.fp32_precision for switch in switches] == [precision] * 2
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def test_pictures_are_painted_as_many_at_a_time_as_fit() -> None:
    asked: list[tuple[int, int]] = []

    def paint(first: int, pictures: int) -> list[int]:
        asked.append((first, pictures))
        if pictures > 3:
            raise torch.OutOfMemoryError("no room\nfor so many")
        return list(range(first, first + pictures))

    assert list(as_many_as_fit(8, 8, paint)) == list(range(8))
    assert asked == [(0, 8), (0, 4), (0, 2), (2, 2), (4, 2), (6, 2)]

    def never(first: int, pictures: int) -> list[int]:
        raise torch.OutOfMemoryError("no room\nfor one")

    with pytest.raises(ValueError, match=r"too small for one picture \(no room\): ask for a smaller width"):
        list(as_many_as_fit(8, 8, never))


def test_data_types_go_by_their_names(model_folder: Path, tmp_path: Path) -> None:
    opened = TextToImagePipeline.from_pretrained(model_folder, device="cpu", dtype="float16")
    assert opened.dtype == torch.float16
    for name in ("half a byte", "int8", torch.int8):
        with pytest.raises(ValueError, match="expected float32, bfloat16 or float16"):
            TextToImagePipeline.from_pretrained(model_folder, device="cpu", dtype=name)
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16"):
        opened.save_pretrained(tmp_path / "saved", dtype="half a byte")
    assert not (tmp_path / "saved").exists()
    opened.to(dtype=torch.float32).save_pretrained(tmp_path / "saved", dtype="bfloat16")
    weights = load_file(tmp_path / "saved" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_latents_have_no_seed_to_paint_from_again(pipe: TextToImagePipeline) -> None:
    output = pipe(PROMPTS[0], latents=torch.zeros(1, 4, 4, 4), seed=3, steps=1)
    assert output.seeds is None
    assert output.images[0].settings["seed"] is None


def test_an_interval_over_everything_switches_the_default_off(model_folder: Path) -> None:
    model = load_model(model_folder)
    call = {"seed": 1, "output_type": "pt"}
    whole = TextToImagePipeline(model)(PROMPTS[0], **call).images
    model.defaults = replace(model.defaults, guidance_interval=(0.5, 2.0))
    part = TextToImagePipeline(model)(PROMPTS[0], **call).images
    off = TextToImagePipeline(model)(PROMPTS[0], guidance_interval=(0, float("inf")), **call).images
    assert off.equal(whole)
    assert not part.equal(whole)
