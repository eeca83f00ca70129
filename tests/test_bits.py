"""Bits per dimension of whole models, where they are known: an untrained network puts out zero, which as v, and as
EDM's with data of unit variance, makes D = x / (1 + sigma²), the denoiser of N(0, I)."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import special, stats

import atelier
from conditioning.context import Unconditional
from ldm.pixel_unet import PixelUNet, PixelUNetConfig
from pipelines.defaults import Defaults
from pipelines.folder import Model, save_model, scheduler_config
from train.bits import measure_bits, some_rows
from train.data import to_unit
from vae.autoencoder import Autoencoder, AutoencoderConfig, Identity

SIDE = 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of coarse noise, with their captions."""
    folder = tmp_path_factory.mktemp("pictures") / "noise"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.normal(128, 40, (SIDE, SIDE, 1)).clip(0, 255).astype(np.uint8).repeat(3, axis=2)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("noise")
    return folder


def read(folder: Path) -> torch.Tensor:
    """[12, 3, SIDE, SIDE] in [-1, 1]."""
    return to_unit(torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in sorted(folder.glob("*.png"))]))


def silent_model(folder: Path, vae: Autoencoder | Identity, *, path: str = "linear", learned: bool = False) -> Path:
    """A model whose network puts out zero, as each does that has not been trained."""
    channels = vae.latent_channels
    unet = PixelUNet(
        PixelUNetConfig(
            in_channels=channels,
            out_channels=channels * (1 + learned),
            sample_size=SIDE,
            block_out_channels=(8, 8),
            layers_per_block=(1, 1),
            attention_heads=(0, 0),
        )
    )
    for name, parameter in unet.named_parameters():
        if name.startswith("conv_out"):
            torch.nn.init.zeros_(parameter)
    config = scheduler_config(path, "edm" if path == "edm" else "v", learned_variance=learned)
    defaults = Defaults(steps=4, size=SIDE, data="noise")
    save_model(Model(unet.eval(), vae.eval(), Unconditional(), config, defaults), folder)
    return folder


@pytest.fixture(scope="module")
def in_pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return silent_model(tmp_path_factory.mktemp("models") / "pixels", Identity(1))


def entropy(images: torch.Tensor) -> float:
    """Mean bits of grey pixels under N(0, 1) rounded to 8 bits."""
    grey = images[:, 0].double().numpy()
    return float(-np.log2(stats.norm.cdf(grey + 1 / 255) - stats.norm.cdf(grey - 1 / 255)).mean())


def exact_bound(images: torch.Tensor) -> float:
    """Expectation of the bound with the small variance, in bits: E (x_0 - D)² = (sigma⁴ x_0² + sigma²) / (1 + sigma²)²
    in the denoising terms, quadrature over the noise in the reconstruction."""
    betas = np.linspace(1e-4, 0.02, 1000)
    signal = np.cumprod(1 - betas)
    noise = (1 - signal) / signal  # sigma² by row
    grey = images[:, 0].double().numpy().ravel()[:, None]
    error = (noise**2 * grey**2 + noise) / (1 + noise) ** 2
    denoising = ((1 / noise[:-1] - 1 / noise[1:]) / 2 * error[:, 1:]).sum(1)
    last = noise[-1]
    prior = (np.log((1 + last) / last) + (last + grey[:, 0] ** 2) / (1 + last) - 1) / 2
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    first = np.sqrt(noise[0])
    mean = (grey + first * points) / (1 + noise[0])
    away = np.abs(grey - mean)
    far, near = (special.log_ndtr(-(away + half) / first) for half in (1 / 255, -1 / 255))
    reconstruction = ((near + np.log(-np.expm1(far - near))) * weights).sum(1) / weights.sum()
    return float((denoising + prior - reconstruction).mean() / math.log(2))


def test_the_bound_of_a_gaussian_model(in_pixels: Path, pictures: Path, tmp_path: Path) -> None:
    images = read(pictures)
    for rows in (40, 1000):  # some estimate the sum over all
        found = measure_bits(str(in_pixels), str(pictures), count=12, rows=rows)
        assert found["pictures"] == 12
        assert found["bits_per_dim"] == pytest.approx(exact_bound(images), abs=0.08)
        assert 0 < found["standard_error"] < 0.2
        assert found["reconstruction"] + found["prior"] + found["denoising"] == pytest.approx(found["bits_per_dim"])
        assert 0 < found["prior"] < 1e-4 < found["reconstruction"]
    assert entropy(images) < exact_bound(images) < entropy(images) + 1


def test_bits_are_printed(
    in_pixels: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ("bits", str(in_pixels), "--data", str(pictures), "--count", "4", "--rows", "20")
    monkeypatch.setattr("sys.argv", ["atelier", *words])
    atelier.main()
    out = capsys.readouterr().out
    found = measure_bits(str(in_pixels), str(pictures), count=4, rows=20)
    assert f"{found['bits_per_dim']:.3f} ± {found['standard_error']:.3f} bits per dimension, 4 pictures" in out
    assert f"the terms of the bound: reconstruction {found['reconstruction']:.3f}, prior " in out


def test_the_other_form_has_the_same_mean(in_pixels: Path, pictures: Path, tmp_path: Path) -> None:
    """And far more variance over a thousand rows."""
    found = measure_bits(str(in_pixels), str(pictures), method="consistency", count=12, rows=1000)
    assert 0.5 < found["standard_error"] < 3
    assert found["bits_per_dim"] == pytest.approx(exact_bound(read(pictures)), abs=4 * found["standard_error"])


@pytest.mark.parametrize("number", [1, 2, 7, 100, 998, 999, 2000])
def test_rows_stand_for_all(number: int) -> None:
    """A sum of 1 / row over a table, from some of its rows, is right on average."""
    last, wanted = 999, sum(1 / row for row in range(1, 1000))
    draw, totals = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        rows, sizes = some_rows(last, number, draw)
        assert sum(sizes) == last
        assert len(rows) == min(number, last)
        assert rows == sorted(set(rows))
        assert 1 <= rows[0] <= rows[-1] <= last
        totals.append(sum(size / row for row, size in zip(rows, sizes, strict=True)))
    assert np.mean(totals) == pytest.approx(wanted, rel=0.3 if number == 1 else 0.02)
    if number >= 100:
        assert np.std(totals) < 0.02 * wanted


@pytest.mark.parametrize("path", ["linear", "edm"])
def test_the_flow_of_a_gaussian_model(path: str, pictures: Path, tmp_path: Path) -> None:
    """Of N(0, 1 + sigma_min²), at pixels spread over their level."""
    folder = silent_model(tmp_path / "model", Identity(1), path=path)
    found = measure_bits(str(folder), str(pictures), method="flow", count=12)
    assert found["bits_per_dim"] == pytest.approx(entropy(read(pictures)), abs=0.02)


def test_latents_are_asked_through_the_autoencoders_bound(pictures: Path, tmp_path: Path) -> None:
    """Around N(0, I) it is the plain VAE's own: reconstruction and KL (Kingma & Welling, equation 3)."""
    torch.manual_seed(0)
    vae = Autoencoder(
        AutoencoderConfig(block_out_channels=(8, 8), latent_channels=2, norm_num_groups=4, scaling_factor=1.0)
    )
    folder = silent_model(tmp_path / "model", vae)
    small = {"count": 12, "rows": 200}
    by_rows, by_flow = (measure_bits(str(folder), str(pictures), method=m, **small) for m in ("elbo", "flow"))  # type: ignore[arg-type]
    images = read(pictures)
    with torch.no_grad():
        posterior = vae.encode(images)
        draws = [posterior.sample(torch.randn(posterior.mean.shape)) for _ in range(16)]
        errors = torch.stack([vae.decode(z) - images for z in draws])
        std = float(errors.square().mean().sqrt())
        density = -errors.square().mean() / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
        nats = density + math.log(2 / 255) - posterior.kl().mean() / images[0].numel()
    wanted = float(-nats) / math.log(2)
    assert by_flow["decoder_deviation"] == pytest.approx(std, rel=0.03)
    assert by_flow["bits_per_dim"] == pytest.approx(wanted, abs=0.05)
    assert wanted < by_rows["bits_per_dim"] < wanted + 0.5  # the small variance costs something, see exact_bound


def test_a_model_of_grey_pictures_is_asked_about_coloured_ones(in_pixels: Path, tmp_path: Path) -> None:
    """A mean of three levels is rounded to one."""
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("noise")
    for method in ("elbo", "flow"):
        found = measure_bits(str(in_pixels), str(tmp_path), method=method, count=4, rows=20)  # type: ignore[arg-type]
        assert 7 < found["bits_per_dim"] < 10


def test_a_learned_variance_is_used(in_pixels: Path, pictures: Path, tmp_path: Path) -> None:
    """Half way between small and large, as a network of zeros has it, is nearer to N(0, I)'s own, the large one."""
    learned = silent_model(tmp_path / "learned", Identity(1), learned=True)
    one, other = (
        measure_bits(str(folder), str(pictures), count=12, rows=200)["bits_per_dim"] for folder in (learned, in_pixels)
    )
    assert entropy(read(pictures)) - 0.05 < one < other - 0.1


def test_a_model_that_is_told_nothing_needs_no_captions(in_pixels: Path, pictures: Path, tmp_path: Path) -> None:
    for file in pictures.glob("*.png"):
        shutil.copy(file, tmp_path)
    with_captions = measure_bits(str(in_pixels), str(pictures), count=12, rows=5, batch=5)
    assert measure_bits(str(in_pixels), str(tmp_path), count=12, rows=5, batch=5) == with_captions


def test_what_cannot_be_measured_is_refused(in_pixels: Path, pictures: Path, tmp_path: Path) -> None:
    edm = silent_model(tmp_path / "edm", Identity(1), path="edm")
    with pytest.raises(ValueError, match="take --method flow"):
        measure_bits(str(edm), str(pictures), count=4)
    for wrong in ({"count": 1}, {"rows": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match="expected at least 2, 1 and 1"):
            measure_bits(str(in_pixels), str(pictures), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not exist"):
        measure_bits(str(in_pixels), str(tmp_path / "nothing"))
