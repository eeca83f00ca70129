"""The model that comes with the package paints what it is asked for, in its own steps and in its student's."""

import pytest

from pipelines import TextToImagePipeline
from tests.test_drawn import needs_font
from train.evaluate import draw_rows, nearest
from train.pictograms import captions

OBJECTS = ("fox", "apple", "house", "bicycle", "crown", "umbrella", "penguin", "rocket", "guitar", "cactus")

pytestmark = needs_font


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained(device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def right(pipe: TextToImagePipeline) -> int:
    """Of 8 samples, those that are nearest to a drawing of their own object."""
    rows = draw_rows("train", 8, OBJECTS, seed=0, font=None)
    images = pipe([captions(*row[:3])[0] for row in rows], seed=1).images
    return sum(nearest(image, row, OBJECTS) == row.object for image, row in zip(images, rows, strict=True))


def test_it_paints_what_it_is_asked_for(pipe: TextToImagePipeline) -> None:
    assert right(pipe) >= 7


def test_its_student_does_in_four_steps_without_guidance(pipe: TextToImagePipeline) -> None:
    own = pipe.model.defaults
    pipe.load_lora("bundled-student")
    defaults = pipe.model.defaults
    assert (defaults.steps, defaults.guidance_scale, defaults.sampler) == (4, 1.0, "ddim")
    assert right(pipe) >= 7
    pipe.unload_loras()
    assert pipe.model.defaults == own
