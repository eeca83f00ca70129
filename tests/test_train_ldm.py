"""Training a model: that it learns and paints what it learnt, whatever it is."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from conditioning.context import Unconditional
from ldm.denoiser import Denoiser
from ldm.schedule import VariancePreserving
from ldm.unet import UNet
from pipelines import TextToImagePipeline
from pipelines.files import checkpoints
from pipelines.folder import load_model
from tests.training import COLOURS, UNET, paint, state, weights
from train.cache import Latents
from train.ldm import main
from train.settings import Config
from train.texts import Texts
from train.watch import validate

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def trained(pixels: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt its eight pictures, with the numbers that it logged."""
    output, numbers = tmp_path_factory.mktemp("trained"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "log", lambda self, values, step: numbers.append({"update": step, **values}))
        main(
            replace(
                pixels,
                output=output,
                updates=300,
                batch_size=16,
                learning_rate=8e-3,
                warmup=10,
                ema_decay=0.98,
                prompts=(),
                steps=10,
                guidance_scale=1.5,
            )
        )
    (output / "numbers.json").write_text(json.dumps(numbers))
    return output


def test_eight_pictures_are_learnt_and_painted_back(trained: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(trained, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    known = np.stack([np.asarray(Image.new("RGB", (8, 8), colour), np.float32) for colour in COLOURS])
    for prompts in ([f"a {colour} square" for colour in COLOURS], list(COLOURS)):  # the first caption, and the other
        painted = np.stack([np.asarray(image, np.float32) for image in pipe(prompts, seed=0).images])
        distance = np.square(painted[:, None] - known).mean((2, 3, 4)) ** 0.5  # RMS, of 255
        assert distance.argmin(1).tolist() == list(range(8))
        assert distance.diagonal().max() < 45


def test_a_run_leaves_numbers_pictures_and_a_model(trained: Path, pixels: Config) -> None:
    numbers = json.loads((trained / "numbers.json").read_text())
    losses = [n["loss"] for n in numbers if "loss" in n]
    assert losses[-1] < 0.25 * losses[0]
    rates = [n["learning_rate"] for n in numbers if "loss" in n]
    assert rates[-1] < 1e-3 * rates[0]
    assert all(n["ema_distance"] > 0 for n in numbers if "loss" in n)
    errors = {float(k.split()[-1]): v for k, v in numbers[-1].items() if k.startswith("validation/")}
    assert len(errors) == 5
    assert 0 < errors[0.25] < errors[1.0] < 0.2  # of the variance of the pictures, where their mean has 1
    with Image.open(trained / "samples" / "0000300.png") as sheet:
        assert np.asarray(sheet.convert("RGB")).std() > 10
    notes = json.loads((checkpoints(trained)[-1] / "atelier.json").read_text())
    assert notes["caption_dropout"] == 0.1
    assert notes["data"] == pixels.data
    assert (notes["steps"], notes["guidance_scale"]) == (10, 1.5)
    averaged, raw = weights(trained), state(trained)["weights"]
    assert {f"unet.{name}" for name in averaged} == raw.keys()
    assert any((weight != raw[f"unet.{name}"]).any() for name, weight in averaged.items())


def test_a_checkpoint_with_autoencoder_and_text_opens_in_diffusers(latents: Config, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    run = main(replace(latents, output=tmp_path, batch_size=8))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints(run)[-1], safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    call: dict = {"num_inference_steps": 5, "guidance_scale": 3.0, "latents": start}
    ours = TextToImagePipeline.from_pretrained(run, device="cpu")("a red square", sampler="ddim", **call).images[0]
    wanted = theirs("a red square", height=16, width=16, **call).images[0]
    assert np.abs(np.asarray(ours, np.float32) - np.asarray(wanted, np.float32)).mean() < 1
    assert np.asarray(ours).std() > 1


def test_the_whole_way_from_nothing(pictures: Path, tmp_path: Path) -> None:
    """Three runs, each by what the one before it left: autoencoder, text encoder, model."""
    import train.clip
    import train.vae

    shared: dict = {"data": str(pictures), "cache": tmp_path / "cache", "updates": 2, "warmup": 1, "workers": 0}
    train.vae.main(train.vae.Config(output=tmp_path / "vae", size=16, crop=16, batch_size=4, **shared))
    train.clip.main(
        train.clip.Config(
            output=tmp_path / "clip",
            size=32,
            vocabulary=560,
            embed_dim=16,
            text_width=32,
            text_layers=1,
            text_heads=2,
            vision_layers=(1,),
            vision_width=32,
            vision_head_width=16,
            batch_size=4,
            **shared,
        )
    )
    run = main(
        Config(
            output=tmp_path / "model",
            vae=str(tmp_path / "vae"),
            text_encoder=str(tmp_path / "clip"),
            unet=UNET,
            batch_size=4,
            steps=2,
            **shared,
        )
    )
    assert paint(run, "a red square").shape == (16, 16, 3)
    with Image.open(run / "samples" / "0000002.png") as sheet:
        assert sheet.height > 2 * 16  # of the data's own prompts, with their captions


def test_validation_is_the_error_on_fixed_noise() -> None:
    class Nothing(torch.nn.Module):
        """Says that the picture is grey, or, as noise, that it is what is seen."""

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    mean = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + 1
    set_ = Latents(mean.half(), torch.zeros_like(mean).half(), [("red",)] * 4)
    texts = Texts(Unconditional(), set_.captions, torch.device("cpu"))
    schedule = VariancePreserving.scaled_linear()
    call = (set_, texts, torch.device("cpu"))

    def model_of(schedule: VariancePreserving, prediction: str) -> SimpleNamespace:
        return SimpleNamespace(denoiser=Denoiser(Nothing(), schedule, prediction), inpaints=False)

    found = validate(model_of(schedule, "sample"), *call)
    wanted = float(mean.square().mean() / mean.var())
    assert list(found.values()) == pytest.approx([wanted] * 5, rel=1e-3)
    found = validate(model_of(schedule, "epsilon"), *call)  # D = x: off by the noise that was added
    sigmas = [float(name.split()[-1]) for name in found]
    scaled = [error / sigma**2 for error, sigma in zip(found.values(), sigmas, strict=True)]
    assert scaled == pytest.approx([scaled[0]] * 5, rel=1e-3)  # one noise for all levels
    torch.manual_seed(99)
    assert validate(model_of(schedule, "epsilon"), *call) == found  # and for all times
    parts = validate(model_of(schedule, "epsilon"), *call, batch_size=3)
    assert list(parts.values()) == pytest.approx(list(found.values()), rel=1e-5)


@pytest.mark.parametrize("batch_size", [3, 7])
def test_validation_tells_each_picture_its_own_caption(batch_size: int) -> None:
    class Told(torch.nn.Module):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return value.view(-1, 1, 1, 1).expand_as(x)

    mean = torch.arange(7.0).view(-1, 1, 1, 1).expand(7, 3, 2, 2)
    set_ = Latents(mean.half(), torch.zeros_like(mean).half(), [(str(i), "another") for i in range(7)])
    model = SimpleNamespace(denoiser=Denoiser(Told(), VariancePreserving.scaled_linear(), "sample"), inpaints=False)
    told = lambda captions: {"value": torch.tensor([float(caption) for caption in captions])}  # noqa: E731
    found = validate(model, set_, told, torch.device("cpu"), batch_size)  # type: ignore[arg-type]
    assert list(found.values()) == pytest.approx([0.0] * 5, abs=1e-9)


def test_bfloat16_trains_float32_weights(latents: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[torch.dtype] = []
    forward = UNet.forward

    def noted(self: UNet, *args: Any, **named: Any) -> torch.Tensor:
        hook = self.conv_in.register_forward_hook(lambda _, __, output: computed.append(output.dtype))
        try:
            return forward(self, *args, **named)
        finally:
            hook.remove()

    monkeypatch.setattr(UNet, "forward", noted)
    AcceleratorState._reset_state(reset_partial_state=True)
    run = main(replace(latents, output=tmp_path, mixed_precision="bf16"))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.bfloat16 in computed
    found = state(run)
    for tensors in (weights(run), found["weights"], found["optimizer"]["state"][0]):
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "flow", "prediction": "velocity", "noise": "logit_normal", "noise_mean": None, "noise_std": None},
        {"path": "edm", "prediction": "edm", "weight": "edm"},
        {"path": "linear", "prediction": "epsilon", "noise": "uniform", "weight": "min_snr"},
        {"path": "cosine", "prediction": "sample", "noise": "uniform", "weight": "elbo"},
        {"zero_snr": True, "weight": "x0", "noise": "uniform", "noise_mean": None, "noise_std": None},
        {"text_encoder": "labels"},
        {"text_encoder": "none"},
        {"caption_dropout": 0.0, "guidance_scale": 1.0},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_every_kind_trains_and_paints(pixels: Config, tmp_path: Path, settings: dict) -> None:
    config = replace(pixels, output=tmp_path, learning_rate=1e-3, **settings)
    if settings.get("text_encoder") == "labels":
        folder = tmp_path / "classes"
        for i, colour in enumerate(COLOURS):
            (folder / colour).mkdir(parents=True)
            Image.new("RGB", (8, 8), colour).save(folder / colour / f"{i}.png")
        config = replace(config, data=str(folder), prompts=("red", "blue"))
    run = main(config)
    model = load_model(run)
    assert model.prediction == config.prediction
    assert model.defaults.caption_dropout == config.caption_dropout
    picture = paint(run, config.prompts[0])
    assert picture.shape == (8, 8, 3)
    assert picture.std() > 0
    if "text_encoder" in settings:
        differs = (picture != paint(run, config.prompts[-1], guidance_scale=3.0)).any()
        assert differs == (config.text_encoder == "labels")
    assert all(w.isfinite().all() for w in weights(run).values())


def test_labels_survive_a_broken_picture(pixels: Config, tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        (tmp_path / "classes" / colour).mkdir(parents=True)
        for i in range(15):
            Image.new("RGB", (8, 8), colour).save(tmp_path / "classes" / colour / f"{i}.png")
    (tmp_path / "classes" / "red" / "3.png").write_bytes(b"broken")
    config = replace(pixels, data=str(tmp_path / "classes"), text_encoder="labels", prompts=("red",))
    run = main(replace(config, output=tmp_path / "run"))
    assert load_model(run).conditioner.names == ("blue", "red")


def test_labels_are_the_first_of_several_captions(pictures: Path, pixels: Config, tmp_path: Path) -> None:
    config = replace(pixels, text_encoder="labels", prompts=(), updates=4, output=tmp_path)
    run = main(config)  # the other captions are no labels, and would be refused
    assert load_model(run).conditioner.names == tuple(sorted(f"a {colour} square" for colour in COLOURS))
    with Image.open(run / "samples" / "0000004.png") as sheet:
        assert sheet.width >= 4 * 8


def test_fine_tuning_starts_from_the_model(pixels: Config, model_folder: Path, tmp_path: Path) -> None:
    config = replace(pixels, model=str(model_folder), output=tmp_path, size=None, caption_dropout=0.2)
    own = {name: getattr(Config(), name) for name in ("unet", "vae", "text_encoder", "steps", "guidance_scale")}
    config = replace(config, **own)  # those of the model
    run = main(replace(config, learning_rate=1e-9))
    before = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in weights(run).items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=0)
    model, base = load_model(run), load_model(model_folder)
    assert (model.prediction, model.scheduler) == (base.prediction, base.scheduler)
    assert model.size == 16
    assert (model.defaults.caption_dropout, model.defaults.data) == (0.2, config.data)
    assert np.abs(paint(run) - paint(model_folder)).max() <= 1
    for part in ("vae", "text_encoder"):
        files = (next((folder / part).glob("*.safetensors")) for folder in (checkpoints(run)[-1], model_folder))
        one, other = map(load_file, files)
        assert all(one[name].equal(other[name]) for name in other)
    # Tuned at another size, that is what it paints from now on; and a run can be tuned further.
    larger = main(replace(config, model=str(run), output=tmp_path / "larger", size=24))
    assert load_model(larger).size == 24
    assert paint(larger).shape == (24, 24, 3)


def test_validation_of_pictures_of_one_value_is_a_number(pixels: Config, tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (8, 8), "white").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("white")
    assert state(main(replace(pixels, data=str(tmp_path), output=tmp_path / "run")))["update"] == 2
