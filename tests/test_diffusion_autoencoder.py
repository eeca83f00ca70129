"""Pictures as codes and back: exact where steps are many, and every path between codes ends where it says."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize

from conditioning.semantic import SemanticConfig, SemanticEncoder
from ldm.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline, diffusion_autoencoder
from pipelines.codes import CodeDiffusion, Codes, CodesConfig, fit_attribute, slerp
from pipelines.defaults import Defaults
from pipelines.diffusion_autoencoder import DiffusionAutoencoderPipeline
from pipelines.folder import Model, save_model, scheduler_config
from pipelines.image import image_batch
from tests.conftest import tiny_model
from vae.autoencoder import Identity, Posterior


def autoencoding(path: str = "scaled_linear", prediction: str = "v", latent: bool = False) -> Model:
    """Random weights, which draw smooth pictures of nothing: a flow can be followed up and down in any field."""
    torch.manual_seed(3)
    channels = 4 if latent else 3
    unet = UNet(
        UNetConfig(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=6,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    )
    encoder = SemanticEncoder(SemanticConfig(code_dim=6, block_out_channels=(8, 16), norm_num_groups=4))
    codes = CodeDiffusion(CodesConfig(6, width=16, depth=1))
    for network in (unet, encoder, codes):
        network.eval().requires_grad_(False)
    codes.mean.uniform_(-1, 1)
    codes.std.uniform_(0.5, 1)
    vae = tiny_model().vae if latent else Identity()
    defaults = Defaults(steps=8, sampler="ddim", size=32 if latent else 8)
    return Model(unet, vae, encoder, scheduler_config(path, prediction), defaults, codes)


def pictures(count: int = 3, side: int = 8) -> list[Image.Image]:
    """Smooth, coloured, each another."""
    y, x = np.mgrid[:side, :side] / side
    drawn = []
    for i in range(count):
        waves = [np.sin(3 * (x * (i + 1) + y * c) + c + i) for c in range(3)]
        drawn.append(Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)))
    return drawn


@pytest.fixture(scope="module")
def pipe() -> DiffusionAutoencoderPipeline:
    return DiffusionAutoencoderPipeline(autoencoding())


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, np.float32) for image in images])


# There and back


@pytest.mark.parametrize(("path", "prediction"), [("scaled_linear", "v"), ("flow", "velocity"), ("edm", "edm")])
def test_the_error_falls_with_the_steps_and_needs_both_codes(path: str, prediction: str) -> None:
    """By Euler's method as 1 / steps, squared, and by Heun's faster."""
    pipe = DiffusionAutoencoderPipeline(autoencoding(path, prediction))
    x0 = image_batch(pictures(), 3, 1, 8, 8, 1)

    def error(codes: Codes, steps: int, sampler: str) -> float:
        return float((pipe.latents(codes, steps=steps, sampler=sampler) - x0).square().mean() / x0.var())

    for sampler, steps, factor in (("ddim", 20, 3), ("heun", 10, 12)):
        fewer, codes = (pipe.encode(pictures(), steps=n, sampler=sampler) for n in (steps, 2 * steps))
        least = error(codes, 2 * steps, sampler)
        assert least * factor < error(fewer, steps, sampler)
    assert least < 1e-3
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert error(codes._replace(stochastic=noise), 20, "heun") > 0.1
    assert error(codes._replace(semantic=codes.semantic.roll(1, 0)), 20, "heun") > 10 * least


def test_in_latents_the_reconstruction_is_the_autoencoders() -> None:
    pipe = DiffusionAutoencoderPipeline(autoencoding(latent=True))
    images = pictures(2, 32)
    codes = pipe.encode(images, steps=20, sampler="heun")
    assert codes.stochastic.shape == (2, 4, 8, 8)
    latents = pipe.model.vae.encode(image_batch(images, 2, 1, 32, 32, 4)).mean
    back = pipe.latents(codes, steps=20, sampler="heun")
    assert float((back - latents).square().mean() / latents.var()) < 0.02


def test_codes_of_what_the_flow_makes_of_noise_are_that_noise(
    pipe: DiffusionAutoencoderPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: down, then up."""
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    semantic = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    x0 = pipe.latents(Codes(semantic, noise), steps=40, sampler="heun")
    # Beyond [-1, 1] there are no pictures: what the flow makes is handed over as latents.
    monkeypatch.setattr(pipe.encoder, "encode", lambda images: semantic)
    monkeypatch.setattr(pipe.model.vae, "encode", lambda images: Posterior(x0, torch.zeros_like(x0)))
    found = pipe.encode(pictures(2), steps=40, sampler="heun").stochastic
    assert float((found - noise).square().mean()) < 0.01


# Between codes


def test_slerp_turns_evenly_and_keeps_the_length() -> None:
    drawn = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 3, 8, 8, generator=drawn) for _ in range(2))
    assert slerp(a, b, 0).allclose(a)
    assert slerp(a, b, 1).allclose(b, atol=1e-6)
    x, y = torch.tensor([[3.0, 0, 0]]), torch.tensor([[0, 3.0, 0]])
    for share in (0.25, 0.5, 0.9):
        angle = share * math.pi / 2
        wanted = torch.tensor([[3 * math.cos(angle), 3 * math.sin(angle), 0]])
        torch.testing.assert_close(slerp(x, y, share), wanted)
    lengths = slerp(a, b, 0.5).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)
    assert (lengths - 1).abs().max() < 0.15  # where a line halfway is shorter by 1/sqrt(2)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    assert slerp(a, -a, 0.3).isfinite().all()


def test_interpolation_begins_and_ends_with_the_reconstructions(pipe: DiffusionAutoencoderPipeline) -> None:
    first, second, _ = pictures()
    between = pixels(pipe.interpolate(first, second, 4))
    ends = pixels(pipe.decode(pipe.encode([first, second])))
    assert np.abs(between[[0, -1]] - ends).max() <= 1
    assert np.abs(between[1] - between[0]).max() > 1
    assert np.abs(between[2] - between[-1]).max() > 1


def test_an_attribute_is_the_plane_of_logistic_regression() -> None:
    """The minimum that scipy finds, of the same convex function."""
    drawn = torch.Generator().manual_seed(0)
    z = torch.randn(60, 3, generator=drawn) * torch.tensor([1.0, 5.0, 0.2]) + 2
    labels = (z[:, 0] + z[:, 1] / 5 + torch.randn(60, generator=drawn)) > 2.4
    scaled = ((z - z.mean(0)) / z.std(0)).double().numpy()
    sign = np.where(labels.numpy(), 1, -1)
    found = minimize(
        lambda w: np.logaddexp(0, -sign * (scaled @ w[:3] + w[3])).sum() + 0.5 * (w[:3] ** 2).sum() / 2,
        np.zeros(4),
        method="BFGS",
        options={"gtol": 1e-9},
    )
    plane = fit_attribute(z, labels, decay=0.5)
    np.testing.assert_allclose(torch.cat([plane.weight, plane.bias[None]]), found.x, atol=1e-4)
    assert float(((plane.logit(z) > 0) == labels).float().mean()) > 0.75
    # Pictures that lie apart have a plane, too.
    assert fit_attribute(z, z[:, 1] > 2).weight.isfinite().all()
    assert fit_attribute(z.bfloat16(), labels.tolist()).weight.dtype == torch.bfloat16


def test_a_code_moves_across_the_plane_by_the_amount(pipe: DiffusionAutoencoderPipeline) -> None:
    z = pipe.semantic(pictures(8))
    plane = pipe.attribute(pictures(8), [True, False] * 4)
    torch.testing.assert_close(plane.distance(plane.move(z, 2.5)), plane.distance(z) + 2.5, atol=1e-4, rtol=1e-4)
    behind = plane.distance(z) < 0
    assert behind.any()
    assert (plane.logit(plane.move(z, 1.1 * float(-plane.distance(z).min()))) > 0).all()
    # At right angles, in units of the codes' spread: no code on the plane's other side is nearer.
    step = (plane.move(z, 1.0) - z) / z.std(0)
    torch.testing.assert_close(step.norm(dim=1), torch.ones(8), atol=1e-4, rtol=1e-4)


def test_manipulation_moves_the_semantic_code_and_keeps_the_noise(pipe: DiffusionAutoencoderPipeline) -> None:
    plane = pipe.attribute(pictures(4), [True, True, False, False])
    codes = pipe.encode(pictures(4))
    same, moved = (pixels(pipe.manipulate(pictures(4), plane, amount)) for amount in (0.0, 3.0))
    assert np.abs(same - pixels(pipe.decode(codes))).max() <= 1
    wanted = pipe.decode(codes._replace(semantic=plane.move(codes.semantic, 3.0)))
    assert np.abs(moved - pixels(wanted)).max() <= 1
    assert np.abs(moved - same).max() > 1


def test_the_second_diffusion_of_an_untrained_network_is_normal() -> None:
    """It begins at zero, where EDM's denoiser is that of N(0, 1): noise comes out as it goes in, with mean and std."""
    codes = autoencoding().codes
    assert codes is not None
    noise = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    drawn = codes.sample(noise)
    torch.testing.assert_close(codes.normalised(drawn), noise, atol=0.02, rtol=0.02)


# What a call promises


def test_save_and_load_give_the_same_codes(tmp_path: Path) -> None:
    model = autoencoding()
    save_model(model, tmp_path)
    again = DiffusionAutoencoderPipeline.from_pretrained(tmp_path, device="cpu")
    pipe = DiffusionAutoencoderPipeline(model)
    pipe.model.unet.to(memory_format=torch.channels_last)
    one, other = pipe.encode(pictures()), again.encode(pictures())
    assert one.semantic.equal(other.semantic)
    torch.testing.assert_close(one.stochastic, other.stochastic, atol=1e-5, rtol=1e-5)
    assert (pixels(pipe.sample(2, seed=1)) == pixels(again.sample(2, seed=1))).all()
    assert {f.name for f in tmp_path.iterdir()} == {"unet", "scheduler", "semantic_encoder", "codes", "atelier.json"}


def test_each_picture_has_its_seed_alone_and_in_a_batch(pipe: DiffusionAutoencoderPipeline) -> None:
    three, alone = pixels(pipe.sample(3, seed=5)), pixels(pipe.sample(1, seed=7))
    assert np.abs(three[2:] - alone).max() <= 1
    assert np.abs(three[1] - three[2]).max() > 1
    images = pictures(2)
    varied, again = pixels(pipe.vary(images, 2, seed=5)), pixels(pipe.vary(images[1], 1, seed=8))
    assert np.abs(varied[3:] - again).max() <= 1
    assert np.abs(varied[0] - varied[1]).max() > 1


def test_pictures_of_every_kind_and_size(pipe: DiffusionAutoencoderPipeline) -> None:
    images = pictures(2)
    wanted = pipe.encode(images)
    numbers = pixels(images) / 255
    for same in (numbers, torch.from_numpy(numbers).permute(0, 3, 1, 2), list(numbers)):
        torch.testing.assert_close(pipe.encode(same).stochastic, wanted.stochastic, atol=1e-5, rtol=1e-5)
    wide = Image.new("RGB", (16, 8), "red")
    wide.paste(images[0], (4, 0))  # the middle square
    assert pipe.semantic(wide).equal(pipe.semantic(images[0]))
    assert pipe.semantic(images[0].convert("L").resize((30, 20))).shape == (1, 6)
    assert pipe.decode(wanted)[0].size == (8, 8)


def test_many_pictures_go_through_in_parts(pipe: DiffusionAutoencoderPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, images = pipe.encode(pictures(5)), pixels(pipe.vary(pictures(5), seed=2))
    monkeypatch.setattr(diffusion_autoencoder, "BATCH", 2)
    seen = []
    monkeypatch.setattr(
        pipe.unet, "forward", lambda x, *rest, **kw: seen.append(len(x)) or UNet.forward(pipe.unet, x, *rest, **kw)
    )
    parts = pipe.encode(pictures(5))
    torch.testing.assert_close(parts.semantic, whole.semantic)
    torch.testing.assert_close(parts.stochastic, whole.stochastic, atol=1e-4, rtol=1e-4)
    assert abs(pixels(pipe.vary(pictures(5), seed=2)) - images).max() <= 1
    assert set(seen) == {2, 1}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p.encode([]), "empty list"),
        (lambda p: p.encode("fox.png"), "got str"),
        (lambda p: p.encode(torch.full((3, 8, 8), 2.0)), r"in \[0, 1\]"),
        (lambda p: p.encode(pictures(), steps=0), "at least one step"),
        (lambda p: p.encode(pictures(), sampler="dpmpp_2m"), "expected ddim or heun"),
        (lambda p: p.decode(Codes(torch.zeros(2, 6), torch.zeros(1, 3, 8, 8))), "got 2 semantic and 1 stochastic"),
        (lambda p: p.vary(pictures(), 0), "count=0"),
        (lambda p: p.sample(0), "count=0"),
        (lambda p: p.interpolate(pictures(2), pictures(1)), "got 2 and 1"),
        (lambda p: p.interpolate(pictures(1), pictures(1), 1), "count=1"),
        (lambda p: p.attribute(pictures(3), [True, False]), "expected 3 times"),
        (lambda p: p.attribute(pictures(2), [2, 0]), "True or False"),
        (lambda p: p.attribute(pictures(2), [True, True]), "all 2 are True"),
    ],
)
def test_bad_calls_say_what_to_do(pipe: DiffusionAutoencoderPipeline, call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(pipe)


def test_models_of_another_kind_are_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"told ClipTextEncoder, not pictures: open it with TextToImagePipeline"):
        DiffusionAutoencoderPipeline.from_pretrained(model_folder, device="cpu")
    model = autoencoding()
    with pytest.raises(ValueError, match="open it by DiffusionAutoencoderPipeline"):
        TextToImagePipeline(model)("a fox")
    with pytest.raises(ValueError, match="can't be saved for diffusers"):
        TextToImagePipeline(model).save_pretrained(tmp_path / "refused")
    model.codes = None
    with pytest.raises(ValueError, match=r"no codes/"):
        DiffusionAutoencoderPipeline(model).sample()
    with pytest.raises(ValueError, match="expected one of a CodeDiffusion"):
        CodesConfig.from_dict({"_class_name": "MLP", "dim": 3})
