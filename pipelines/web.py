"""A page to paint on, in a browser: `atelier web`, or `page(pipe).launch()`. Needs gradio: pip install -e '.[web]'."""

import random
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from conditioning.labels import Labels
from ldm.samplers import SAMPLERS
from pipelines.device import as_many_as_fit
from pipelines.image import rgb, trained_sides
from pipelines.scheduler import sampler_of
from pipelines.text_to_image import TextToImagePipeline

MOST = 8  # pictures of one call


def page(pipe: TextToImagePipeline) -> Any:
    """The `gradio.Blocks` of a pipeline; one picture is painted at a time, others wait. ValueError without gradio."""
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install -e '.[web]'") from None
    model, defaults = pipe.model, pipe.model.defaults
    folder = tempfile.TemporaryDirectory(prefix="atelier-")  # pictures, with what they were painted from in them

    def paint(
        prompt: str,
        negative: str,
        count: int,
        seed: float | None,
        steps: int,
        guidance: float,
        sampler: str,
        drawn: dict[str, Any] | None,
        strength: float,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[list[str], str]:
        seed = random.randrange(2**31) if seed is None else int(seed)
        image, mask = begun(drawn, model.size, model.vae.downscale)
        begin: dict[str, Any] = {"image": image, "mask": mask} if image else {}
        if image and not mask:
            begin["strength"] = strength
        call: dict[str, Any] = {"negative_prompt": negative or None, "steps": int(steps), "guidance_scale": guidance}
        call |= {"sampler": sampler, "callback": lambda i, *_: progress((i + 1, int(steps)), unit="steps")}

        def some(first: int, pictures: int) -> Any:
            return pipe(prompt or "", **call, **begin, num_images_per_prompt=pictures, seed=seed + first).images

        try:
            painted = list(as_many_as_fit(int(count), MOST, some))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        place = Path(tempfile.mkdtemp(dir=folder.name))
        files = [str(place / f"{seed + i}.png") for i in range(len(painted))]
        for picture, file in zip(painted, files, strict=True):
            picture.save(file)
        return files, f"seed {seed}" + (f" to {seed + len(files) - 1}" if len(files) > 1 else "")

    with gr.Blocks(title="Atelier", analytics_enabled=False) as blocks:
        gr.Markdown(f"# Atelier\n{pipe.source}, on {pipe.device.type}")
        with gr.Row():
            with gr.Column():
                prompt: Any
                if isinstance(model.conditioner, Labels):
                    prompt = gr.Dropdown(list(model.conditioner.names), label="What to paint")
                else:
                    told = model.is_told
                    prompt = gr.Textbox(value="", label="What to paint", lines=2, visible=told)
                button = gr.Button("Paint", variant="primary")
                count = gr.Slider(1, MOST, 1, step=1, label="Pictures")
                with gr.Accordion("How", open=False):
                    scale = defaults.guidance_scale
                    guided = defaults.caption_dropout != 0 and model.is_told
                    negative = gr.Textbox("", label="What to steer away from", visible=guided and prompt.visible)
                    guidance = gr.Slider(1, max(15, scale), max(1, scale), step=0.1, label="Guidance", visible=guided)
                    seed = gr.Number(None, label="Seed (empty: another each time)", precision=0, minimum=0)
                    steps = gr.Slider(1, max(200, defaults.steps), defaults.steps, step=1, label="Steps")
                    sampler = gr.Dropdown(
                        list(SAMPLERS), value=defaults.sampler or sampler_of(model.scheduler), label="Sampler"
                    )
                with gr.Accordion("Begin from a picture; paint over the parts to be filled", open=False):
                    drawn = gr.ImageMask(type="pil", layers=False, show_label=False)
                    label = "Share of the steps that are run on it, where nothing is painted over"
                    strength = gr.Slider(0.05, 1, 0.8, step=0.05, label=label)
            with gr.Column():
                gallery = gr.Gallery(label="Pictures", format="png", object_fit="contain", columns=2)
                said = gr.Textbox(label="Painted from", interactive=False)
        given = [prompt, negative, count, seed, steps, guidance, sampler, drawn, strength]
        for event in (button.click, prompt.submit) if hasattr(prompt, "submit") else (button.click,):
            event(paint, given, [gallery, said], concurrency_limit=1, concurrency_id="paint", api_name="paint")
    return blocks


def begun(drawn: dict[str, Any] | None, size: int, multiple: int) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture to begin from and the mask painted on it, of what the editor gives; None where there is none.

    Both are brought to about as many pixels as a square of `size` has, in the picture's ratio, sides multiples of
    `multiple`: what the model was trained on.
    """
    if not drawn or drawn["background"] is None:
        return None, None
    strokes = [layer.getchannel("A").point(lambda alpha: 255 * (alpha > 0)) for layer in drawn["layers"] if layer]
    mask = strokes[0] if strokes and strokes[0].getbbox() else None
    picture = rgb(drawn["background"])
    sides = trained_sides(picture, size, multiple)
    picture = ImageOps.fit(picture, sides, Image.Resampling.LANCZOS)
    return picture, mask and ImageOps.fit(mask, sides, Image.Resampling.NEAREST)
