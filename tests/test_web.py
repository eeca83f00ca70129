"""The page: what is asked for on it is what a call paints, and what is wrong is said there."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from pipelines import TextToImagePipeline
from pipelines.web import begun, page
from train.ldm import main

CALL: dict[str, Any] = {"steps": 3, "guidance": 2.0, "sampler": "heun", "negative": "grey", "strength": 0.5}


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def client(pipe: TextToImagePipeline) -> Iterator[Client]:
    blocks = page(pipe)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    yield Client(address, verbose=False)
    blocks.close()


def asked(client: Client, prompt: str, **call: Any) -> tuple[list[np.ndarray], str]:
    order = ("negative", "count", "seed", "steps", "guidance", "sampler", "drawn", "strength")
    gallery, said = client.predict(prompt, *(call.get(name) for name in order), api_name="/paint")
    return [np.asarray(Image.open(one["image"])) for one in gallery], said


def test_it_paints_what_a_call_paints(client: Client, pipe: TextToImagePipeline) -> None:
    found, said = asked(client, "a red circle", count=2, seed=5, **CALL)
    how = {"steps": 3, "guidance_scale": 2.0, "sampler": "heun", "negative_prompt": "grey"}
    for image, wanted in zip(found, pipe("a red circle", num_images_per_prompt=2, seed=5, **how).images, strict=True):
        assert np.array_equal(image, np.asarray(wanted))
    assert said == "seed 5 to 6"
    (one,), first = asked(client, "a red circle", count=1, **CALL)
    (other,), second = asked(client, "a red circle", count=1, **CALL)
    assert first != second
    assert not np.array_equal(one, other)


def test_it_begins_from_a_picture_and_fills_what_is_painted_over(
    client: Client, pipe: TextToImagePipeline, tmp_path: Path
) -> None:
    picture = Image.new("RGB", (16, 16), "orange")
    strokes = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    strokes.paste((255, 255, 255, 255), (0, 0, 16, 8))
    for name, image in (("picture", picture), ("strokes", strokes)):
        image.save(tmp_path / f"{name}.png")
    files = {name: handle_file(str(tmp_path / f"{name}.png")) for name in ("picture", "strokes")}
    drawn = {"background": files["picture"], "layers": [files["strokes"]], "composite": files["picture"]}
    (found,), _ = asked(client, "a tree", count=1, seed=1, drawn=drawn, **CALL)
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 16, 8))
    how = {"steps": 3, "guidance_scale": 2.0, "sampler": "heun", "negative_prompt": "grey", "seed": 1}
    wanted = pipe("a tree", image=picture, mask=mask, **how).images[0]  # what is painted over is forgotten
    assert np.array_equal(found, np.asarray(wanted))
    (found,), _ = asked(client, "a tree", count=1, seed=1, drawn=drawn | {"layers": []}, **CALL)
    assert np.array_equal(found, np.asarray(pipe("a tree", image=picture, strength=0.5, **how).images[0]))


def test_what_is_wrong_is_said_on_the_page(client: Client, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "orange").save(tmp_path / "picture.png")
    picture = handle_file(str(tmp_path / "picture.png"))
    drawn = {"background": picture, "layers": [], "composite": picture}
    with pytest.raises(AppError, match="at least one step"):
        asked(client, "a tree", count=1, drawn=drawn, **CALL | {"strength": 0.1})


@pytest.mark.parametrize("kind", ["labels", "none"])
def test_models_of_labels_and_of_nothing(kind: str, pixels: Any, tmp_path: Path, in_process: None) -> None:
    """Whose default settings may lie beyond what the page has for others."""
    unusual = {"steps": 300, "guidance_scale": 0.5 if kind == "none" else 20.0, "text_encoder": kind}
    run = main(replace(pixels, output=tmp_path, updates=1, prompts=(), **unusual))
    blocks = page(TextToImagePipeline.from_pretrained(run, device="cpu"))
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    prompt = "a red square" if kind == "labels" else None
    given = ("", 1, 0, 2, max(1, unusual["guidance_scale"]), "ddim", None, 0.8)
    gallery, _ = Client(address, verbose=False).predict(prompt, *given, api_name="/paint")
    blocks.close()
    assert Image.open(gallery[0]["image"]).size == (8, 8)


def test_pictures_are_brought_to_the_models_size() -> None:
    assert begun(None, 16, 4) == (None, None)
    assert begun({"background": None, "layers": [], "composite": None}, 16, 4) == (None, None)
    photo, stroke = Image.new("RGBA", (400, 100), "red"), Image.new("RGBA", (400, 100), (0, 0, 0, 0))
    stroke.paste((255, 255, 255, 255), (0, 0, 200, 100))
    image, mask = begun({"background": photo, "layers": [stroke], "composite": photo}, 16, 4)
    assert image is not None
    assert mask is not None
    assert image.size == mask.size == (32, 8)
    assert np.array_equal(np.asarray(mask), np.repeat([[255] * 16 + [0] * 16], 8, 0))


def test_a_picture_without_strokes_has_no_mask() -> None:
    picture, nothing = Image.new("RGBA", (4, 4), "red"), Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image, mask = begun({"background": picture, "layers": [nothing], "composite": picture}, 16, 4)
    assert image is not None
    assert (image.mode, mask) == ("RGB", None)
