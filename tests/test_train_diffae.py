"""Training a diffusion autoencoder: both codes do their part, and nothing about how it was run shows in it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import train.diffae
from conditioning.semantic import SemanticConfig
from ldm.unet import UNetConfig
from pipelines.diffusion_autoencoder import DiffusionAutoencoderPipeline
from pipelines.files import checkpoints
from pipelines.folder import load_model
from train.codes import train_codes
from train.config import parse
from train.diffae import PRESETS, Config, main
from vae.autoencoder import Autoencoder

pytestmark = pytest.mark.usefixtures("in_process")

ROOT = Path(__file__).resolve().parents[1]
UNET = UNetConfig(
    block_out_channels=(16, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
    norm_num_groups=8,
)
FILES = (
    "unet/diffusion_pytorch_model.safetensors",
    "semantic_encoder/diffusion_pytorch_model.safetensors",
    "codes/diffusion_pytorch_model.safetensors",
    "atelier.json",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures: the code has a colour to tell, which is on the left or on the right."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(("red", "green", "blue")):
        for place in (0, 4):
            image = Image.new("RGB", (8, 8), "black")
            image.paste(colour, (place, 0, place + 4, 8))
            image.save(folder / f"{i}-{place}.png")
            (folder / f"{i}-{place}.txt").write_text(f"{colour} at {place}")
    return folder


@pytest.fixture(scope="module")
def config(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of a few updates in pixel space."""
    return Config(
        data=str(pictures),
        output=tmp_path_factory.mktemp("unused"),
        cache=tmp_path_factory.mktemp("cache"),
        vae="none",
        unet=UNET,
        encoder=SemanticConfig(code_dim=8, block_out_channels=(8, 16), fields=2),
        size=8,
        updates=2,
        batch_size=4,
        warmup=1,
        checkpoint_every=1000,
        steps=2,
        code_width=32,
        code_depth=1,
        code_updates=2,
        workers=0,
    )


def state(run: Path) -> dict:
    return torch.load(checkpoints(run)[-1] / "training" / "state.pt", weights_only=True)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, np.float32) for image in images]) / 255


@pytest.fixture(scope="module")
def trained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt its six pictures, with the numbers that it logged."""
    output, numbers = tmp_path_factory.mktemp("trained"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "log", lambda self, values, step: numbers.append({"update": step, **values}))
        learning = replace(config, output=output, updates=120, batch_size=24, learning_rate=1e-2, ema_decay=0.98)
        main(replace(learning, noise_mean=1.0, warmup=10, steps=10, code_width=64, code_depth=2, code_updates=300))
    (output / "numbers.json").write_text(json.dumps(numbers))
    return output


def originals(pictures: Path) -> list[Image.Image]:
    return [Image.open(file) for file in sorted(pictures.glob("*.png"))]


def test_the_semantic_code_says_what_is_seen_and_the_noise_says_the_rest(trained: Path, pictures: Path) -> None:
    pipe = DiffusionAutoencoderPipeline.from_pretrained(trained, device="cpu")
    images = originals(pictures)
    known = pixels(images)
    varied = pixels(pipe.vary(images, seed=0))
    distance = np.square(varied[:, None] - known).mean((2, 3, 4))
    assert distance.argmin(1).tolist() == list(range(6))  # whatever noise they come from
    same = pixels(pipe.decode(pipe.encode(images)))
    assert np.square(same - known).mean() < 0.5 * distance.diagonal().mean()
    finer = pixels(pipe.decode(pipe.encode(images, steps=60), steps=60))
    assert np.square(finer - known).mean() < 0.5 * np.square(same - known).mean()


def test_new_pictures_are_like_those_trained_on(trained: Path, pictures: Path) -> None:
    pipe = DiffusionAutoencoderPipeline.from_pretrained(trained, device="cpu")
    known = pixels(originals(pictures))
    new = pixels(pipe.sample(24, seed=0))
    distance = np.square(new[:, None] - known).mean((2, 3, 4))
    assert np.median(distance.min(1)) < 0.25 * np.square(known[:, None] - known).mean()
    assert len(set(distance.argmin(1).tolist())) > 3


def test_a_plane_through_the_codes_moves_the_colour(trained: Path, pictures: Path) -> None:
    """From right to left: the attribute is a place, which the plane finds and the picture shows."""
    pipe = DiffusionAutoencoderPipeline.from_pretrained(trained, device="cpu")
    images = originals(pictures)
    left = ["-0" in file.name for file in sorted(pictures.glob("*.png"))]
    plane = pipe.attribute(images, left)
    assert ((plane.distance(pipe.semantic(images)) > 0) == torch.tensor(left)).all()
    right = [image for image, is_left in zip(images, left, strict=True) if not is_left]
    before, after = pixels(right), pixels(pipe.manipulate(right, plane, 3.0))

    def leaning(shown: np.ndarray) -> float:
        return float((shown[:, :, :4] - shown[:, :, 4:]).mean())

    assert leaning(after) > leaning(before) + 0.2


def test_a_run_leaves_numbers_pictures_and_a_model(trained: Path, config: Config) -> None:
    numbers = json.loads((trained / "numbers.json").read_text())
    losses = [n["loss"] for n in numbers if "loss" in n]
    assert losses[-1] < 0.3 * losses[0]
    assert all(n["ema_distance"] > 0 for n in numbers if "loss" in n)
    errors = numbers[-1]
    assert 0 < errors["reconstruction error"] < errors["variation error"] < 0.1
    assert 0 < errors["validation/sigma 0.25"] < errors["validation/sigma 8.0"] < 0.5  # without a code it would be 1
    with Image.open(trained / "samples" / "0000120.png") as sheet:
        assert sheet.width * 4 == pytest.approx(sheet.height * 6, rel=0.05)  # six pictures, in four rows
        assert np.asarray(sheet.convert("RGB")).std() > 10
    assert (trained / "samples" / "0000120-new.png").is_file()
    model = load_model(trained)
    assert (model.defaults.steps, model.defaults.sampler, model.size) == (10, "ddim", 8)
    assert model.defaults.data == config.data
    before = state(trained)["networks"]
    for part, prefix in (("unet", model.unet), ("encoder", model.conditioner)):
        averaged = prefix.state_dict()
        assert {name for name in before if name.startswith(part)} == {f"{part}.{name}" for name in averaged}
        assert any((averaged[name] != before[f"{part}.{name}"]).any() for name in averaged)


def test_in_the_latents_of_an_autoencoder(config: Config, model_folder: Path, tmp_path: Path) -> None:
    run = main(replace(config, output=tmp_path, vae=str(model_folder), size=16, path="flow", prediction="velocity"))
    pipe = DiffusionAutoencoderPipeline.from_pretrained(run, device="cpu")
    assert isinstance(pipe.model.vae, Autoencoder)
    assert pipe.encode(Image.new("RGB", (16, 16), "red")).stochastic.shape == (1, 4, 4, 4)
    assert pipe.sample(2, seed=0)[1].size == (16, 16)


# Runs that are stopped, divided, or started again


class Killed(Exception):
    pass


def test_a_killed_run_ends_with_the_same_bytes(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, updates=4, checkpoint_every=2)
    whole = main(replace(config, output=tmp_path / "whole"))
    rate = train.diffae.learning_rate

    def killing(update: int, **kwargs) -> float:
        if update == 3:
            raise Killed
        return rate(update, **kwargs)

    monkeypatch.setattr(train.diffae, "learning_rate", killing)
    with pytest.raises(Killed):
        main(replace(config, output=tmp_path / "killed"))
    monkeypatch.undo()
    monkeypatch.setattr(train.diffae, "train_codes", None)  # and again, between the two stages
    with pytest.raises(TypeError):
        main(replace(config, output=tmp_path / "killed"))
    monkeypatch.undo()
    torch.manual_seed(99)  # nothing hangs on what the process drew before
    again = main(replace(config, output=tmp_path / "killed"))
    for name in FILES:
        assert (checkpoints(whole)[-1] / name).read_bytes() == (checkpoints(again)[-1] / name).read_bytes(), name
    for sheet in ("0000004.png", "0000004-new.png"):
        assert (whole / "samples" / sheet).read_bytes() == (again / "samples" / sheet).read_bytes()
    a, b = state(whole), state(again)
    assert a["update"] == b["update"] == 4
    assert all(one.equal(other) for one, other in zip(a["ema"], b["ema"], strict=True))
    # Done is done; other settings are another run; a longer run of the same goes on, and has other codes.
    kept = (checkpoints(again)[-1] / FILES[2]).stat().st_mtime_ns
    main(replace(config, output=tmp_path / "killed"))
    assert (checkpoints(again)[-1] / FILES[2]).stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="code_width: 32 before, 16 now"):
        main(replace(config, output=tmp_path / "killed", code_width=16))
    longer = main(replace(config, output=tmp_path / "killed", updates=5))
    assert state(longer)["update"] == 5
    assert (checkpoints(longer)[-1] / FILES[2]).read_bytes() != (checkpoints(whole)[-1] / FILES[2]).read_bytes()


def test_two_processes_started_from_another_folder_train_what_one_trains(config: Config, tmp_path: Path) -> None:
    from tests.test_launch import ACCELERATE, free_port, run

    flags = {
        "data": config.data,
        "output": "two",
        "cache": "cache",
        "vae": "none",
        "size": 8,
        "updates": 1,
        "batch-size": 2,
        "clip": 1e9,
        "steps": 2,
        "code-updates": 2,
        "workers": 0,
        "unet.norm-num-groups": 8,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--unet.block-out-channels", "16", "16", "--encoder.block-out-channels", "8", "16"]
    launch = (ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()))
    script = ROOT / "train" / "diffae.py"
    result = run(*launch, script, *words, cwd=tmp_path, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("6 pictures to train on") == 1
    base = PRESETS["shapes"]
    alone = replace(
        base,
        data=config.data,
        output=tmp_path / "one",
        cache=tmp_path / "cache",
        vae="none",
        size=8,
        updates=1,
        batch_size=4,
        clip=1e9,
        steps=2,
        code_updates=2,
        workers=0,
        unet=replace(base.unet, norm_num_groups=8, block_out_channels=(16, 16)),
        encoder=replace(base.encoder, block_out_channels=(8, 16)),
    )
    states = [state(tmp_path / "two"), state(main(alone))]
    # After one update the momentum, AdamW's or Muon's, is the gradient times a constant.
    moments = [
        torch.cat([s.get("momentum", s.get("mean")).flatten() for s in one["optimizer"]["state"].values()])
        for one in states
    ]
    scale = float(moments[1].abs().max())
    assert scale > 0
    torch.testing.assert_close(moments[0], moments[1], atol=1e-5 * scale, rtol=1e-3)


# The second stage


def test_codes_of_two_kinds_are_learnt() -> None:
    drawn = torch.Generator().manual_seed(0)
    centres = torch.tensor([[4.0, -100.0], [6.0, 100.0]])  # of very different size: normalised
    codes = centres[torch.randint(2, (400,), generator=drawn)] + torch.randn(400, 2, generator=drawn) * 0.1
    found = train_codes(codes, width=32, depth=1, updates=400, seed=0)
    with torch.no_grad():
        new = found.sample(torch.randn(200, 2, generator=drawn), steps=20)
    which = (new[:, 1] > 0).long()
    assert 60 < int(which.sum()) < 140
    away = ((new - centres[which]) / found.std).norm(dim=1)
    assert float(away.median()) < 0.5  # of the distance between them, which is about 2√2
    again = train_codes(codes, width=32, depth=1, updates=3, seed=0).state_dict()
    assert all(
        w.equal(again[n]) for n, w in train_codes(codes, width=32, depth=1, updates=3, seed=0).state_dict().items()
    )


# What stops a run


@pytest.mark.parametrize("broken", ["errors_by_level", "grid", "save_model"])
def test_what_cannot_work_fails_before_the_first_update(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def failing(*args, **kwargs) -> None:
        raise OSError("no room")

    monkeypatch.setattr(train.diffae, broken, failing)
    monkeypatch.setattr(train.diffae, "draws", None)  # is not come to
    with pytest.raises(OSError, match="no room"):
        main(replace(config, output=tmp_path))
    assert not (tmp_path / ".rehearsal").exists()


def test_a_loss_that_is_no_number_stops_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, output=tmp_path, updates=6, checkpoint_every=2)
    rate = train.diffae.learning_rate
    monkeypatch.setattr(
        train.diffae, "learning_rate", lambda update, **kwargs: 1e30 if update == 2 else rate(update, **kwargs)
    )
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at update 3: the checkpoints in .* are untouched"):
        main(config)
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-0000002"]
    monkeypatch.undo()
    assert state(main(config))["update"] == 6  # goes on from the good one


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"updates": 0}, "--updates is 0: expected at least 1"),
        ({"code_updates": -1}, "--code-updates is -1"),
        ({"checkpoint_every": 0}, "--checkpoint-every is 0"),
        ({"size": 0}, "--size is 0"),
        ({"code_depth": 0}, "--code-depth is 0"),
        ({"code_width": 0}, "--code-width is 0"),
        ({"clip": 0.0}, "--clip 0.0: expected above 0"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": "nowhere"}, "--data 'nowhere' does not exist"),
        ({"vae": "nowhere"}, "nowhere.*missing"),
        ({"size": 18, "vae": "MODEL"}, "--size 18: expected a multiple of 4"),
        ({"prediction": "velocity"}, "expected scaled_linear"),
        ({"steps": 1001, "path": "flow", "prediction": "velocity"}, "1001"),  # and not at the first checkpoint
        (
            {"unet": replace(UNET, down_block_types=("DownBlock2D",) * 2, mid_block_type="UNetMidBlock2D",
                             up_block_types=("UpBlock2D",) * 2)},
            "would not be told the semantic code",
        ),
    ],
)  # fmt: skip
def test_runs_that_make_no_sense_are_refused(
    config: Config, model_folder: Path, tmp_path: Path, settings: dict, words: str
) -> None:
    settings = {k: str(model_folder) if v == "MODEL" else v for k, v in settings.items()}
    with pytest.raises(ValueError, match=words):
        main(replace(config, output=tmp_path / "run", **settings))
    assert not checkpoints(tmp_path / "run")


def test_flags_replace_what_the_preset_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["diffae.py", "--updates", "3", "--encoder.code-dim", "9", "--unet.block-out-channels", "32", "64"]
    )
    base = PRESETS["shapes"]
    wanted = replace(base, updates=3, encoder=replace(base.encoder, code_dim=9))
    wanted = replace(wanted, unet=replace(base.unet, block_out_channels=(32, 64)))
    assert parse(Config, PRESETS, default="shapes") == wanted
