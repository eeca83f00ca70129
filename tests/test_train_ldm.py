"""Training a model: that it learns and paints what it learnt, and that nothing about how it was run shows in it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import train.ldm
import train.watch
from conditioning.context import Unconditional
from ldm.denoiser import Denoiser
from ldm.schedule import VariancePreserving
from ldm.unet import UNetConfig
from pipelines import TextToImagePipeline
from pipelines.folder import load_model
from train.build import fitted, new_unet
from train.cache import Latents, Texts
from train.config import parse
from train.ldm import draw_batch, main
from train.presets import PRESETS, check_model_settings, preset_for
from train.settings import SMALL, Config, settled
from train.sources import first_captions, open_source
from train.state import checkpoints
from train.watch import validate

pytestmark = pytest.mark.usefixtures("in_process")

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "purple", "orange")
UNET = UNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=2,
    norm_num_groups=8,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of one colour each; two captions say which."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} square\n{colour}\n")
    return folder


@pytest.fixture(scope="module")
def pixels(pictures: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of a few updates in pixel space."""
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
def latents(pixels: Config, model_folder: Path) -> Config:
    """The same in the latents of an autoencoder."""
    return replace(pixels, vae=str(model_folder), size=16)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1] / "unet" / "diffusion_pytorch_model.safetensors")


def state(run: Path) -> dict:
    return torch.load(checkpoints(run)[-1] / "training" / "state.pt", weights_only=True)


def paint(run: Path, prompt: str = "a red square", **call) -> np.ndarray:
    pipe = TextToImagePipeline.from_pretrained(run, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(prompt, seed=0, **call).images[0], np.float32)


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
    averaged, raw = weights(trained), state(trained)["unet"]
    assert averaged.keys() == raw.keys()
    assert any((averaged[name] != raw[name]).any() for name in raw)


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


# Runs that are stopped, divided, or started again


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    rate = train.ldm.learning_rate

    def killing(update: int, **kwargs) -> float:
        if update == at:
            raise Killed
        return rate(update, **kwargs)

    monkeypatch.setattr(train.ldm, "learning_rate", killing)


def test_a_killed_run_ends_with_the_same_bytes(
    latents: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(latents, updates=6, checkpoint_every=3, batch_size=3, accumulate=2, caption_dropout=0.3)
    whole = main(replace(config, output=tmp_path / "whole"))
    kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        main(replace(config, output=tmp_path / "killed"))
    monkeypatch.undo()
    torch.manual_seed(99)  # nothing hangs on what the process drew before
    again = main(replace(config, output=tmp_path / "killed"))
    for name in ("unet/diffusion_pytorch_model.safetensors", "atelier.json", "scheduler/scheduler_config.json"):
        assert (checkpoints(whole)[-1] / name).read_bytes() == (checkpoints(again)[-1] / name).read_bytes()
    a, b = state(whole), state(again)
    assert a["update"] == b["update"] == 6
    assert all(a["unet"][name].equal(b["unet"][name]) for name in a["unet"])
    for one, other in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(one[name].equal(other[name]) for name in one)
    assert (whole / "samples/0000006.png").read_bytes() == (again / "samples/0000006.png").read_bytes()
    # Done is done; other settings are another run; a longer run of the same goes on.
    before = (checkpoints(again)[-1] / "training" / "state.pt").stat().st_mtime_ns
    main(replace(config, output=tmp_path / "killed"))
    assert (checkpoints(again)[-1] / "training" / "state.pt").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"learning_rate: 0.002 before, 0.5 now"):
        main(replace(config, output=tmp_path / "killed", learning_rate=0.5))
    assert state(main(replace(config, output=tmp_path / "killed", updates=7)))["update"] == 7


def test_accumulated_steps_are_one_batch(latents: Config, tmp_path: Path) -> None:
    config = replace(latents, updates=1, clip=1e9)
    runs = {
        (size, parts): main(replace(config, output=tmp_path / f"{size}x{parts}", batch_size=size, accumulate=parts))
        for size, parts in ((8, 1), (4, 2), (4, 1))
    }
    # After one update the momentum, AdamW's or Muon's, is the gradient times a constant.
    moments = {
        key: torch.cat([s.get("momentum", s.get("mean")).flatten() for s in state(run)["optimizer"]["state"].values()])
        for key, run in runs.items()
    }
    scale = moments[8, 1].abs().max()
    torch.testing.assert_close(moments[4, 2], moments[8, 1], atol=1e-5 * float(scale), rtol=1e-4)
    assert (moments[4, 1] - moments[8, 1]).abs().max() > 0.01 * scale


def test_batches_do_not_hang_on_how_they_are_divided(pixels: Config) -> None:
    drawn = torch.Generator().manual_seed(0)
    mean = torch.randn(6, 3, 2, 2, generator=drawn)
    set_ = Latents(mean, torch.zeros_like(mean), [(f"{i}", f"number {i}") for i in range(6)])
    config = replace(pixels, batch_size=8, caption_dropout=0.25)
    whole = draw_batch(config, set_, 5, 0, 8, torch.device("cpu"))
    halves = [draw_batch(replace(config, batch_size=4), set_, 5, first, 8, torch.device("cpu")) for first in (0, 4)]
    for name in ("x0", "noise", "u"):
        assert torch.cat([getattr(half, name) for half in halves]).equal(getattr(whole, name))
    assert halves[0].captions + halves[1].captions == whole.captions
    # Each place in the batch has its share of the noise levels.
    assert (whole.u * 8).floor().tolist() == list(range(8))
    assert not draw_batch(config, set_, 6, 0, 8, torch.device("cpu")).noise.equal(whole.noise)
    many = [c for u in range(200) for c in draw_batch(config, set_, u, 0, 8, torch.device("cpu")).captions]
    assert 0.2 < many.count("") / len(many) < 0.3
    said = {f"{i}" for i in range(6)} | {f"number {i}" for i in range(6)}
    assert set(many) == said | {""}


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
    found = validate(Denoiser(Nothing(), schedule, "sample"), *call)
    wanted = float(mean.square().mean() / mean.var())
    assert list(found.values()) == pytest.approx([wanted] * 5, rel=1e-3)
    found = validate(Denoiser(Nothing(), schedule, "epsilon"), *call)  # D = x: off by the noise that was added
    sigmas = [float(name.split()[-1]) for name in found]
    scaled = [error / sigma**2 for error, sigma in zip(found.values(), sigmas, strict=True)]
    assert scaled == pytest.approx([scaled[0]] * 5, rel=1e-3)  # one noise for all levels
    torch.manual_seed(99)
    assert validate(Denoiser(Nothing(), schedule, "epsilon"), *call) == found  # and for all times
    parts = validate(Denoiser(Nothing(), schedule, "epsilon"), *call, batch_size=3)
    assert list(parts.values()) == pytest.approx(list(found.values()), rel=1e-5)


def test_gradient_checkpointing_changes_memory_alone(latents: Config, tmp_path: Path) -> None:
    plain = weights(main(replace(latents, output=tmp_path / "plain", updates=1)))
    saving = weights(main(replace(latents, output=tmp_path / "saving", updates=1, gradient_checkpointing=True)))
    for name, weight in plain.items():
        torch.testing.assert_close(saving[name], weight, atol=1e-5, rtol=1e-4)


def test_bfloat16_trains_float32_weights(latents: Config, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    run = main(replace(latents, output=tmp_path, mixed_precision="bf16"))
    AcceleratorState._reset_state(reset_partial_state=True)
    found = state(run)
    for tensors in (weights(run), found["unet"], found["optimizer"]["state"][0]):
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        assert all(t.isfinite().all() for t in tensors.values())


# Other paths, other conditions


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "flow", "prediction": "velocity", "noise": "logit_normal", "noise_mean": None, "noise_std": None},
        {"path": "edm", "prediction": "edm", "weight": "edm"},
        {"path": "linear", "prediction": "epsilon", "noise": "uniform", "weight": "min_snr"},
        {"path": "cosine", "prediction": "sample", "noise": "uniform", "weight": "elbo"},
        {"zero_snr": True, "weight": "x0"},
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


def test_settings_that_are_left_open() -> None:
    assert (settled(Config(), "bf16").noise_mean, settled(Config(), "bf16").mixed_precision) == (0.4, "bf16")
    assert settled(Config(noise_mean=1.0), "no").noise_std == 1.4
    for noise in ("uniform", "logit_normal"):
        assert settled(Config(noise=noise), "no").noise_mean is None


def test_guidance_interval_and_min_snr_reach_the_model(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict = {}
    weight = train.ldm.training_weight
    monkeypatch.setattr(train.ldm, "training_weight", lambda *a, **kw: given.update(kw) or weight(*a, **kw))
    config = replace(pixels, weight="min_snr", min_snr_gamma=4.0, min_snr_floor=0.1, guidance_interval=(0.3, 2.0))
    run = main(replace(config, output=tmp_path, zero_snr=True))
    assert load_model(run).defaults.guidance_interval == (0.3, 2.0)
    assert given == {"gamma": 4.0, "floor": 0.1}


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


# What stops a run


@pytest.mark.parametrize("broken", ["validate", "grid", "save_model"])
def test_what_cannot_work_fails_before_the_first_update(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def failing(*args, **kwargs) -> None:
        raise OSError("no room")

    monkeypatch.setattr(train.watch, broken, failing)
    monkeypatch.setattr(train.ldm, "draw_batch", None)  # is not come to
    with pytest.raises(OSError, match="no room"):
        main(replace(pixels, output=tmp_path))
    assert not (tmp_path / ".rehearsal").exists()


def test_rehearsing_changes_nothing(pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = main(replace(pixels, output=tmp_path / "one"))
    assert not (one / ".rehearsal").exists()
    monkeypatch.setattr(train.ldm, "rehearse", lambda *args: None)
    other = main(replace(pixels, output=tmp_path / "other"))
    assert all(w.equal(weights(other)[name]) for name, w in weights(one).items())


def test_a_checkpoint_is_saved_before_its_samples_are_painted(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.ldm, "rehearse", lambda *args: None)
    monkeypatch.setattr(train.watch, "grid", None)
    with pytest.raises(TypeError):
        main(replace(pixels, output=tmp_path))
    assert state(tmp_path)["update"] == 2


def test_the_loss_scale_of_fp16_is_taken_up_again(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = train.ldm.start

    def scaling(*args, **kwargs) -> Accelerator:
        accelerator = started(*args, **kwargs)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
        return accelerator

    monkeypatch.setattr(train.ldm, "start", scaling)
    for updates, scale in ((2, 4096.0), (3, 8192.0)):
        assert state(main(replace(pixels, output=tmp_path, updates=updates)))["scaler"]["scale"] == scale


def test_another_global_batch_is_refused(pixels: Config, tmp_path: Path) -> None:
    config = replace(pixels, output=tmp_path)
    main(config)
    with pytest.raises(ValueError, match=r"updates see 4 pictures .* now it would be 8"):
        main(replace(config, updates=3, accumulate=2))
    assert state(main(replace(config, updates=3, batch_size=2, accumulate=2)))["update"] == 3  # the same four


def test_a_loss_that_is_no_number_stops_the_run(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(pixels, output=tmp_path, updates=6, checkpoint_every=2)
    rate = train.ldm.learning_rate
    monkeypatch.setattr(
        train.ldm, "learning_rate", lambda update, **kwargs: 1e30 if update == 2 else rate(update, **kwargs)
    )
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at update 3 \(captions .*--learning-rate"):
        main(config)
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-0000002"]
    assert paint(tmp_path).std() > 0
    monkeypatch.undo()
    assert state(main(config))["update"] == 6  # goes on from the good one


def test_gradients_that_are_no_numbers_reach_no_checkpoint(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, steps = Accelerator.backward, []

    def poisoned(self, loss, **kwargs) -> None:
        backward(self, loss, **kwargs)
        steps.append(loss)
        if len(steps) == 4:
            self._models[-1].network.conv_in.weight.grad.fill_(float("nan"))

    monkeypatch.setattr(Accelerator, "backward", poisoned)
    with pytest.raises(ValueError, match=r"gradient is nan at update 3"):
        main(replace(pixels, output=tmp_path, updates=6, checkpoint_every=2))
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-0000002"]
    assert all(w.isfinite().all() for w in weights(tmp_path).values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"updates": 0}, "--updates is 0: expected at least 1"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"accumulate": 0}, "--accumulate is 0"),
        ({"checkpoint_every": 0}, "--checkpoint-every is 0"),
        ({"size": -8}, "--size is -8"),
        ({"size": 0}, "--size is 0"),
        ({"caption_dropout": 1.0}, "--caption-dropout is 1.0: expected a share"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": "nowhere"}, "--data 'nowhere' does not exist"),
        ({"model": "nowhere/at/all", "unet": SMALL, "vae": "bundled", "text_encoder": "bundled"}, "not a model folder"),
        ({"model": "MODEL", "zero_snr": True}, "its own --unet, --vae, --text-encoder, --zero-snr: train a new one"),
        ({"noise": "uniform", "noise_mean": 0.0}, "uniform training noise has no mean"),
        ({"vae": "nowhere"}, "nowhere.*missing"),
        ({"text_encoder": "nowhere"}, "nowhere.*missing"),
        ({"size": 18, "vae": "MODEL"}, "--size 18: expected a multiple of 4"),
        ({"prediction": "velocity"}, "expected scaled_linear"),
        ({"prediction": "epsilon", "zero_snr": True}, "pure noise"),
        ({"path": "flow"}, "v-prediction needs"),
        ({"path": "flow", "prediction": "velocity", "zero_snr": True}, "zero.snr"),
        ({"noise": "log_normal", "noise_std": 0.0}, "std"),
        ({"weight": "min_snr", "zero_snr": True}, "min-SNR"),
    ],
)
def test_runs_that_make_no_sense_are_refused(
    pixels: Config, model_folder: Path, tmp_path: Path, settings: dict, words: str
) -> None:
    settings = {k: str(model_folder) if v == "MODEL" else v for k, v in settings.items()}
    with pytest.raises(ValueError, match=words):
        main(replace(pixels, output=tmp_path / "run", **settings))
    assert not checkpoints(tmp_path / "run")


def test_flags_replace_what_the_preset_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(text: str) -> Config:
        monkeypatch.setattr(sys, "argv", ["ldm.py", *text.split()])
        return parse(Config, PRESETS, default="shapes")

    assert command("") == PRESETS["shapes"]
    assert command("--preset bundled") == command("--preset=bundled") == PRESETS["bundled"]
    changed = command("--preset bundled --updates 3 --unet.block-out-channels 32 64 --size 64 --prompts red blue")
    unet = replace(PRESETS["bundled"].unet, block_out_channels=(32, 64))
    assert changed == replace(PRESETS["bundled"], updates=3, unet=unet, size=64, prompts=("red", "blue"))
    with pytest.raises(ValueError, match=r"--preset 'big': expected one of shapes, new, fine-tune, bundled"):
        command("--preset big")
    with pytest.raises(SystemExit) as stopped:
        command("--update 3 --optimiser lion")
    assert stopped.value.code not in (0, None)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("", "shapes"),
        ("--updates 3", "shapes"),
        ("--data my_pictures", "new"),
        ("--data=my_pictures", "new"),
        ("--data my_pictures --model bundled", "fine-tune"),
        ("--model=bundled", "fine-tune"),
    ],
)
def test_what_a_run_starts_from(arguments: str, name: str) -> None:
    assert preset_for(arguments.split()) == name
    check_model_settings(PRESETS[name])


# New networks


@pytest.mark.parametrize("conditioning", ["text", "labels", "none"])
def test_a_new_unet_puts_out_zero(conditioning: str) -> None:
    config = fitted(UNET, 4, 8, 3 if conditioning == "labels" else None, 32 if conditioning == "text" else None)
    unet = new_unet(config)
    context = {"encoder_hidden_states": torch.randn(2, 5, 32)} if conditioning == "text" else {}
    context |= {"class_labels": torch.tensor([0, 2])} if conditioning == "labels" else {}
    x = torch.randn(2, 4, 8, 8)
    assert unet(x, 10.0, **context).abs().max() == 0
    for block in unet.mid_block.resnets:
        h = torch.randn(2, 32, 4, 4)
        assert block(h, torch.randn(2, 64)).equal(h)
    for attention in unet.mid_block.attentions:
        assert attention(h, unet._context(context.get("encoder_hidden_states"), None, h.dtype)).equal(h)
    loss = (unet(x, 10.0, **context) - 1).square().mean()
    loss.backward()
    assert unet.conv_out.weight.grad.abs().max() > 0  # zeros, but not dead


def test_the_labels_of_joined_sets_are_those_of_each(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "shapes" / "one.png")
    (tmp_path / "shapes" / "one.txt").write_text("a dot")
    (tmp_path / "shapes" / "two.png").write_bytes(b"broken")  # is not decoded for its caption
    (tmp_path / "shapes" / "two.txt").write_text("a line")
    joined = first_captions(open_source(f"{pictures}+{tmp_path / 'shapes'}", 8))
    assert joined == {f"a {colour} square" for colour in COLOURS} | {"a dot", "a line"}


def test_validation_of_pictures_of_one_value_is_a_number(pixels: Config, tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (8, 8), "white").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("white")
    assert state(main(replace(pixels, data=str(tmp_path), output=tmp_path / "run")))["update"] == 2
