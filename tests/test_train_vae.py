"""Training the autoencoder: it learns, latents are normalised, the adversary joins late, and a kill is harmless."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import train.vae
from pipelines.files import checkpoints, load_autoencoder
from tests.training import poison
from train.data import read_pictures, to_unit
from train.sources import open_source
from train.vae import crops, main, new_autoencoder, normalise_latents, paint_prior, reconstruct
from train.vae_settings import PRESETS, TINY, Config
from vae.autoencoder import Autoencoder, AutoencoderConfig
from vae.losses import LossWeights

pytestmark = pytest.mark.usefixtures("in_process")

MODEL = AutoencoderConfig(
    block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, mid_block_add_attention=False
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Forty pictures of soft coloured patches."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(40):
        patches = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        patches.resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return Config(
        data=str(folder),
        output=tmp_path_factory.mktemp("unused"),
        cache=tmp_path_factory.mktemp("cache"),
        model=MODEL,
        size=16,
        crop=8,
        updates=2,
        batch_size=8,
        warmup=1,
        checkpoint_every=1000,
        discriminator_width=8,
        workers=0,
    )


def run(config: Config, output: Path) -> tuple[Path, list[dict]]:
    numbers: list[dict] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "log", lambda self, values, step: numbers.append(values))
        return main(replace(config, output=output)), numbers


def pixels(config: Config) -> torch.Tensor:
    source = open_source(config.data, config.size)
    return read_pictures(source, config.size, config.cache, workers=0, progress=False).pixels


@pytest.fixture(scope="module")
def trained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    longer = replace(config, updates=200, crop=16, warmup=10, learning_rate=1e-2, ema_decay=0.98)
    return run(longer, tmp_path_factory.mktemp("trained"))


def test_it_learns_to_give_pictures_back(trained: tuple[Path, list[dict]], config: Config) -> None:
    output, numbers = trained
    losses = [n["pixel"] for n in numbers if "pixel" in n]  # after 50, 100, 150 and 200 updates
    assert losses[-1] < 0.75 * losses[0]
    assert all(n["ema_distance"] > 0 for n in numbers if "pixel" in n)
    data = pixels(config)
    vae = load_autoencoder(output)
    found, psnr = reconstruct(vae, data, torch.device("cpu"))
    assert psnr == pytest.approx(numbers[-1]["psnr"], abs=0.01)  # of all pictures: there are fewer than 64
    flat = to_unit(data).mean((0, 2, 3), keepdim=True).expand_as(found)
    blurred = torch.nn.functional.interpolate(to_unit(data).mean((2, 3), keepdim=True), (16, 16))
    for naive in (flat, blurred):  # one colour for all, and the mean colour of each
        error = ((naive - to_unit(data)) / 2).square().flatten(1).mean(1)
        assert psnr > float(-10 * error.log10().mean()) + 2
    # By hand, in other words: 20 log10 of 255 over the RMS error.
    error = ((found.double() - to_unit(data).double()) * 127.5).square().flatten(1).mean(1).sqrt()
    assert psnr == pytest.approx(float((20 * torch.log10(255 / error)).mean()), abs=1e-3)
    with Image.open(output / "samples" / "0000200.png") as sheet:
        assert np.asarray(sheet).std() > 20


def test_latents_have_zero_mean_and_unit_variance(trained: tuple[Path, list[dict]], config: Config) -> None:
    vae = load_autoencoder(trained[0])
    with torch.no_grad():
        posterior = vae.encode(to_unit(pixels(config)))
        drawn = torch.Generator().manual_seed(0)
        samples = torch.cat([posterior.sample(torch.randn(posterior.mean.shape, generator=drawn)) for _ in range(8)])
    channels = samples.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(channels.std(1), torch.ones(4), atol=0.02, rtol=0)
    assert posterior.mean.std() > 0.3  # it is pictures that vary, not the noise alone


def test_normalising_counts_the_posteriors_own_spread(config: Config) -> None:
    torch.manual_seed(0)
    vae, data = Autoencoder(MODEL), pixels(config)
    assert vae.quant_conv is not None
    assert vae.quant_conv.bias is not None
    with torch.no_grad():
        vae.quant_conv.bias[4:] = torch.linspace(-6, 2, 4)  # from next to no noise to far more noise than signal
        normalise_latents(vae, data, torch.device("cpu"))
        posterior = vae.encode(to_unit(data))
        noise = torch.randn((50, *posterior.mean.shape), generator=torch.Generator().manual_seed(0))
        samples = torch.stack([posterior.sample(one) for one in noise]).movedim(2, 0).flatten(1)
    torch.testing.assert_close(samples.mean(1), torch.zeros(4), atol=0.01, rtol=0)
    torch.testing.assert_close(samples.std(1), torch.ones(4), atol=0.01, rtol=0)


def test_what_goes_on_training_is_not_what_was_normalised(trained: tuple[Path, list[dict]], config: Config) -> None:
    folder = checkpoints(trained[0])[-1]
    state = torch.load(folder / "training" / "state.pt", weights_only=True)
    vae = load_autoencoder(folder)
    saved = vae.state_dict()
    assert not torch.allclose(state["model"]["quant_conv.weight"], saved["quant_conv.weight"], rtol=1e-2)
    names = [name for name, _ in vae.named_parameters()]
    averaged = dict(zip(names, state["ema"], strict=True))
    assert averaged["encoder.conv_in.weight"].equal(saved["encoder.conv_in.weight"])
    assert not averaged["encoder.conv_in.weight"].equal(state["model"]["encoder.conv_in.weight"])
    # Folded or not, the pictures are the same.
    images = to_unit(pixels(config)[:4])
    with torch.no_grad():
        normalised = vae.decode(vae.encode(images).mode)
        vae.load_state_dict(averaged)
        torch.testing.assert_close(vae.decode(vae.encode(images).mode), normalised, atol=1e-4, rtol=1e-4)


def test_diffusers_opens_it(trained: tuple[Path, list[dict]], config: Config) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL.from_pretrained(checkpoints(trained[0])[-1])
    ours = load_autoencoder(trained[0])
    images = to_unit(pixels(config)[:4])
    with torch.no_grad():
        latents = theirs.encode(images).latent_dist.mean * theirs.config.scaling_factor
        torch.testing.assert_close(ours.encode(images).mean, latents, atol=1e-4, rtol=1e-4)
        decoded = theirs.decode(latents / theirs.config.scaling_factor).sample
        torch.testing.assert_close(ours.decode(latents), decoded, atol=1e-4, rtol=1e-4)


def test_a_killed_run_ends_with_the_same_bytes(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LossWeights(adversarial=0.5, adversarial_start=1)
    config = replace(config, updates=6, checkpoint_every=3, loss=loss, size=24, crop=24)
    whole, _ = run(config, tmp_path / "whole")
    rate = train.vae.learning_rate

    class Killed(Exception):
        pass

    def killing(update: int, **kwargs) -> float:
        if update == 5:
            raise Killed
        return rate(update, **kwargs)

    monkeypatch.setattr(train.vae, "learning_rate", killing)
    with pytest.raises(Killed):
        run(config, tmp_path / "killed")
    monkeypatch.undo()
    torch.manual_seed(99)
    again, _ = run(config, tmp_path / "killed")
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert (checkpoints(whole)[-1] / name).read_bytes() == (checkpoints(again)[-1] / name).read_bytes()
    a, b = (torch.load(checkpoints(r)[-1] / "training" / "state.pt", weights_only=True) for r in (whole, again))
    for part in ("model", "judge"):
        assert all(a[part][name].equal(b[part][name]) for name in a[part])
    for part in ("optimizer", "judge_optimizer"):
        for one, other in zip(a[part]["state"].values(), b[part]["state"].values(), strict=True):
            assert all(one[name].equal(other[name]) for name in one)
    with pytest.raises(ValueError, match=r"updates see 8 pictures .* now it would be 4"):
        run(replace(config, batch_size=4), tmp_path / "killed")


def test_told_to_end_it_saves_and_goes_on(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, updates=6)
    whole, _ = run(config, tmp_path / "whole")
    rate, before = train.vae.learning_rate, signal.getsignal(signal.SIGTERM)

    def telling(update: int, **kwargs) -> float:
        if update == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(update, **kwargs)

    monkeypatch.setattr(train.vae, "learning_rate", telling)
    with pytest.raises(SystemExit) as ended:
        run(config, tmp_path / "told")
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert [folder.name for folder in checkpoints(tmp_path / "told")] == ["checkpoint-0000004"]
    monkeypatch.undo()
    again, _ = run(config, tmp_path / "told")
    name = "diffusion_pytorch_model.safetensors"
    assert (checkpoints(whole)[-1] / name).read_bytes() == (checkpoints(again)[-1] / name).read_bytes()


def test_the_gradient_that_is_logged_is_the_autoencoders(config: Config, tmp_path: Path) -> None:
    config = replace(config, size=24, crop=24, updates=1)
    norms = []
    for weight in (0.0, 1e-9):  # of an adversary that judges, and moves nothing
        _, numbers = run(replace(config, loss=LossWeights(adversarial=weight)), tmp_path / str(weight))
        norms += [logged["gradient_norm"] for logged in numbers if "gradient_norm" in logged]
    assert norms[0] > 0
    assert norms == pytest.approx([norms[0]] * 2, rel=1e-4)


def test_the_adversary_joins_at_its_update(config: Config, tmp_path: Path) -> None:
    config = replace(config, size=24, crop=24)
    plain = LossWeights(adversarial=0.5, adversarial_start=2)
    states = {}
    for updates in (2, 4):
        output, _ = run(replace(config, updates=updates, loss=plain), tmp_path / str(updates))
        states[updates] = torch.load(checkpoints(output)[-1] / "training" / "state.pt", weights_only=True)
    assert not states[2]["judge_optimizer"]["state"]  # it has judged nothing yet
    assert {float(s["step"]) for s in states[4]["judge_optimizer"]["state"].values()} == {2.0}
    for part in ("model", "judge"):
        assert all(weight.isfinite().all() for weight in states[4][part].values())
    # Up to there, the autoencoder is the one that is trained without an adversary.
    without, _ = run(replace(config, updates=2, loss=LossWeights()), tmp_path / "without")
    state = torch.load(checkpoints(without)[-1] / "training" / "state.pt", weights_only=True)
    assert all(state["model"][name].equal(weight) for name, weight in states[2]["model"].items())
    longer, _ = run(replace(config, updates=4, loss=LossWeights()), tmp_path / "longer")
    state = torch.load(checkpoints(longer)[-1] / "training" / "state.pt", weights_only=True)
    assert any((state["model"][name] != weight).any() for name, weight in states[4]["model"].items())


def test_a_plain_vae_learns_its_bound_and_shows_samples(config: Config, tmp_path: Path) -> None:
    loss = LossWeights(pixel=0, squared=0, gradient=0, kl=0, elbo=1)
    some = {"updates": 150, "crop": 16, "warmup": 10, "learning_rate": 1e-2, "ema_decay": 0.98}
    output, numbers = run(replace(config, loss=loss, **some), tmp_path)
    bounds = [n["elbo"] for n in numbers if "elbo" in n]
    assert bounds[-1] < bounds[0] - 0.2  # nats a value
    raw: list[torch.Tensor] = []
    vae = Autoencoder(replace(MODEL, scaling_factor=0.18215, shift_factor=0.3))
    assert vae.post_quant_conv is not None
    vae.post_quant_conv.register_forward_hook(lambda module, args, output: raw.append(args[0]))
    paint_prior(vae, 16, torch.device("cpu"))
    assert float(raw[0].std()) == pytest.approx(1, abs=0.05)  # the prior of the raw latent
    assert float(raw[0].mean()) == pytest.approx(0, abs=0.05)
    with Image.open(output / "samples" / "0000150.png") as sheet:
        # 32 pairs, of 40 pictures, then 32 samples: 12 rows of 8 tiles.
        assert sheet.size == (8 * 68 + 4, 12 * 68 + 4)
        samples = np.asarray(sheet)[8 * 68 + 4 :, 4:]
    assert samples[:64, :64].std() > 5
    assert np.abs(samples[:64, :64].astype(float) - samples[:64, 68:132]).mean() > 5


def test_crops_do_not_hang_on_the_number_of_processes(config: Config) -> None:
    data = torch.arange(4 * 16 * 16 * 3).view(4, 16, 16, 3).remainder(251).to(torch.uint8)
    whole, noise, added = crops(data, config, 3, 0, 1, (4, 4, 4))
    assert whole.shape == (8, 3, 8, 8)
    halves = [crops(data, replace(config, batch_size=4), 3, rank, 2, (4, 4, 4)) for rank in (0, 1)]
    assert torch.cat([half[0] for half in halves]).equal(whole)
    assert torch.cat([half[1] for half in halves]).equal(noise)
    assert added is None
    one, two = (
        crops(data, replace(config, latent_noise=s, decoder_only=True, init="x"), 3, 0, 1, (4, 64, 64)) for s in (1, 3)
    )
    assert one[1].equal(two[1])
    torch.testing.assert_close(3 * one[2], two[2])
    levels = two[2].std((1, 2, 3))  # half-normal, each crop its own
    assert 0.5 < float(levels.square().mean().sqrt()) / 3 < 1.6
    assert float(levels.max()) > 2 * float(levels.min())
    # Each is a square of one of the pictures, as it is or mirrored.
    windows = to_unit(data).unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 8, 8)
    windows = torch.cat([windows, windows.flip(3)])
    for crop in whole:
        assert (windows == crop).flatten(1).all(1).any()
    plain = crops(data, replace(config, mirror=False), 3, 0, 1, (4, 4, 4))[0]
    assert not plain.equal(whole)


def test_fine_tuning_starts_from_an_autoencoder(
    trained: tuple[Path, list[dict]], config: Config, tmp_path: Path
) -> None:
    before = load_autoencoder(trained[0])
    output, numbers = run(replace(config, init=str(trained[0]), model=TINY, learning_rate=1e-9), tmp_path)
    data = pixels(config)
    assert numbers[-1]["psnr"] == pytest.approx(reconstruct(before, data, torch.device("cpu"))[1], abs=0.05)
    assert load_autoencoder(output).config == before.config


def test_fine_tuning_takes_the_size_of_what_it_begins_with(
    trained: tuple[Path, list[dict]], config: Config, tmp_path: Path
) -> None:
    tuned = replace(PRESETS["fine-tune"], data=config.data, cache=config.cache, workers=0, init=str(trained[0]))
    output, _ = run(replace(tuned, crop=8, updates=1, batch_size=2), tmp_path)
    saved = json.loads((checkpoints(output)[-1] / "training" / "config.json").read_text())
    assert (saved["size"], saved["learning_rate"]) == (16, 1e-4)
    larger, _ = run(replace(tuned, size=20, crop=8, updates=1, batch_size=2), tmp_path / "larger")
    assert load_autoencoder(larger).config.sample_size == 20  # what train/ldm.py goes by
    with pytest.raises(ValueError, match="--crop 64 is larger than --size 16"):
        run(replace(tuned, updates=1), tmp_path / "too-large")


def test_halved_latents_are_turned_by_all_quarters(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = []
    rot90 = torch.rot90
    monkeypatch.setattr(torch, "rot90", lambda x, k, dims: turned.append(k) or rot90(x, k, dims))  # type: ignore
    some = replace(config, updates=12, checkpoint_every=12, turned=True, loss=LossWeights(halved=0.25))
    run(some, tmp_path / "whole")
    assert turned[1::2] == [-k for k in turned[::2]]  # there and back
    assert set(turned[::2]) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="turned: True before, False now"):
        run(replace(some, turned=False), tmp_path / "whole")


def test_pictures_need_no_captions_but_stay_the_same(config: Config, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(config.data).glob("*.png"):
        (bare / file.name).write_bytes(file.read_bytes())
    short = replace(config, data=str(bare), updates=1)
    run(short, tmp_path / "run")
    (bare / "0.txt").write_text("a caption, which nobody reads")
    run(replace(short, updates=2), tmp_path / "run")
    (bare / "39.png").unlink()
    with pytest.raises(ValueError, match="--data is not what this run was trained on: pictures or captions were added"):
        run(replace(short, updates=3), tmp_path / "run")


def test_a_decoder_alone_leaves_the_latents_as_they_are(
    trained: tuple[Path, list[dict]], config: Config, tmp_path: Path
) -> None:
    before = load_autoencoder(trained[0])
    output, _ = run(replace(config, init=str(trained[0]), model=TINY, decoder_only=True), tmp_path)
    after = load_autoencoder(output)
    images = to_unit(pixels(config)[:4])
    one, other = before.encode(images), after.encode(images)
    assert one.mean.equal(other.mean)
    assert one.logvar.equal(other.logvar)
    assert (before.decode(one.mean) - after.decode(one.mean)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="--decoder-only keeps the encoder of an autoencoder: name it by --init"):
        replace(config, decoder_only=True)


def test_a_decoder_learns_to_do_without_noise_in_its_latents(
    trained: tuple[Path, list[dict]], config: Config, tmp_path: Path
) -> None:
    job = replace(
        config, init=str(trained[0]), model=TINY, decoder_only=True, updates=100, batch_size=16, learning_rate=4e-3
    )
    images = to_unit(pixels(config))
    errors = {}
    for noise in (0.0, 1.0):
        vae = load_autoencoder(run(replace(job, latent_noise=noise), tmp_path / f"{noise}")[0])
        latents = vae.encode(images).mean
        added = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        errors[noise] = [float((vae.decode(latents + s * added) - images).square().mean()) for s in (0.0, 0.7)]
    assert errors[1.0][1] < 0.8 * errors[0.0][1]
    assert errors[1.0][0] < 2 * errors[0.0][0]
    for settings in ({"latent_noise": 0.1}, {"latent_noise": -0.1}):
        with pytest.raises(ValueError, match=r"--latent-noise .* expected at least 0, and --decoder-only"):
            replace(config, **settings)


def test_a_loss_that_is_no_number_stops_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = train.vae.learning_rate
    monkeypatch.setattr(
        train.vae, "learning_rate", lambda update, **kwargs: 1e30 if update == 2 else rate(update, **kwargs)
    )
    with pytest.raises(ValueError, match=r"(loss|gradient) is (nan|inf) at update 3"):
        run(replace(config, updates=6, checkpoint_every=2), tmp_path)
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-0000002"]
    load_autoencoder(tmp_path)


def test_gradients_that_are_no_numbers_reach_no_checkpoint(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 4, lambda accelerator: accelerator._models[0].encoder.conv_in.weight)
    with pytest.raises(ValueError, match="gradient is nan at update 3"):
        run(replace(config, updates=6, checkpoint_every=2), tmp_path)
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-0000002"]


def test_the_perceptual_loss_goes_where_the_pictures_are(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Distance(torch.nn.Module):
        place = None

        def to(self, device):  # type: ignore[override]
            Distance.place = device
            return self

        def forward(self, output, target):
            return (output - target).square().flatten(1).mean(1)

    monkeypatch.setattr(train.vae, "load_perceptual", Distance)
    run(replace(config, updates=1, loss=LossWeights(perceptual=1.0)), tmp_path)
    assert Distance.place == torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"updates": 0}, "--updates is 0"),
        ({"crop": 17}, "--crop 17 is larger than --size 16"),
        ({"loss": LossWeights(halved=0.1), "crop": 6}, "--crop 6: expected a multiple of 4"),
        ({"loss": LossWeights(adversarial=1.0)}, "--crop 8: the discriminator needs at least 24"),
        ({"crop": 7}, "--crop 7: expected multiples of 2"),
        ({"size": 17}, "--size 17.*expected multiples of 2"),  # which would show at the first checkpoint only
        ({"model": replace(MODEL, use_quant_conv=False)}, "use_quant_conv"),
        ({"data": "nowhere"}, "'nowhere' does not exist"),
        ({"init": "nowhere", "model": TINY}, "nowhere.*missing"),
        ({"init": "nowhere"}, "--init nowhere brings its own --model"),
        ({"init": "none", "model": TINY}, "--init none has no weights"),
        ({"clip": 0.0}, "--clip 0.0: expected above 0"),
        ({"size": None}, "--size is missing"),
        ({"loss": LossWeights(0, 0, 0, 1)}, "--loss has no weight for how near"),
        ({"loss": LossWeights(texture=1.0)}, "--crop 8: texture is measured in squares of at least 16"),
        ({"turned": True}, "--turned is of --loss.halved"),
        ({"loss": LossWeights(0, 0, 0, 0, halved=0.5, elbo=1)}, "--loss.halved is of"),
    ],
)
def test_runs_that_make_no_sense_are_refused(config: Config, tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(replace(config, **settings), tmp_path)
    assert not checkpoints(tmp_path)


def test_the_size_of_the_pictures_is_noted(trained: tuple[Path, list[dict]]) -> None:
    assert load_autoencoder(trained[0]).config.sample_size == 16  # what train/ldm.py goes by


def test_settings_are_kept_with_the_checkpoint(trained: tuple[Path, list[dict]]) -> None:
    saved = json.loads((checkpoints(trained[0])[-1] / "training" / "config.json").read_text())
    assert (saved["updates"], saved["crop"], saved["loss"]["kl"]) == (200, 16, LossWeights().kl)


def test_the_branches_of_a_new_autoencoder_begin_at_zero() -> None:
    vae = new_autoencoder(replace(TINY, mid_block_add_attention=True))
    h = torch.randn(2, 32, 4, 4)
    for middle in (vae.encoder.mid_block, vae.decoder.mid_block):
        assert middle(h).equal(h)
    posterior = vae.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert (posterior.logvar / 2).exp().mean().item() == pytest.approx(vae.scale * math.exp(-3), rel=0.1)
