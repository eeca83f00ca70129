"""The page: what is asked for on it is what a call paints, and what is wrong is said there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from pipelines import TextToImagePipeline
from pipelines.web import begun, page

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
    wanted = pipe("a tree", image=picture, mask=mask, strength=0.5, **how).images[0]
    assert np.array_equal(found, np.asarray(wanted))


def test_what_is_wrong_is_said_on_the_page(client: Client, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "orange").save(tmp_path / "picture.png")
    picture = handle_file(str(tmp_path / "picture.png"))
    drawn = {"background": picture, "layers": [], "composite": picture}
    with pytest.raises(AppError, match="at least one step"):
        asked(client, "a tree", count=1, drawn=drawn, **CALL | {"strength": 0.1})


def test_a_picture_without_strokes_has_no_mask() -> None:
    assert begun(None) == (None, None)
    assert begun({"background": None, "layers": [], "composite": None}) == (None, None)
    picture, nothing = Image.new("RGBA", (4, 4), "red"), Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image, mask = begun({"background": picture, "layers": [nothing], "composite": picture})
    assert image is not None
    assert (image.mode, mask) == ("RGB", None)
