"""The U-Net for small pictures: its parts against PyTorch's own, its sizes against the lecture's, and a model of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import train.vae
from ldm.blocks import Network
from ldm.pixel_unet import ConditionalNorm, PixelUNet, PixelUNetConfig, SelfAttention
from pipelines import TextToImagePipeline
from pipelines.files import open_network, save_network
from pipelines.folder import Model, for_atelier_alone, load_model, scheduler_config
from train.build import build
from train.config import parse
from train.ldm import main
from train.presets import PRESETS
from train.set_presets import LECTURE, SMALL_SETS
from train.settings import Config
from train.sources import open_source
from vae.autoencoder import Autoencoder, AutoencoderConfig

SMALL = PixelUNetConfig(block_out_channels=(8, 16), layers_per_block=(1, 1), attention_heads=(0, 2), norm_num_groups=4)


def randomised(network: nn.Module) -> nn.Module:
    """What begins at zero would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return network


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("cifar10", 5.0), ("celeba-tiny", 35), ("celeba-tiny-without-attention", 31), ("celeba-small", 80),
     ("celeba-big", 81)],
)  # fmt: skip
def test_sizes_are_those_of_the_lecture(preset: str, millions: float) -> None:
    with torch.device("meta"):
        network = PixelUNet(PRESETS[preset].unet)
    count = sum(p.numel() for p in network.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.02)
    side = PRESETS[preset].size
    assert network(torch.zeros(2, 3, side, side, device="meta"), 0.1).shape == (2, 3, side, side)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_conditional_norm_is_the_norm_then_scale_and_shift(norm: str) -> None:
    layer = randomised(ConditionalNorm(8, replace(SMALL, norm=norm)))
    x, condition = torch.randn(5, 8, 6, 7), torch.randn(5, 8)
    plain = nn.BatchNorm2d(8, affine=False) if norm == "batch" else nn.GroupNorm(4, 8, affine=False)
    scale, shift = layer.condition(condition).view(5, 2, 8, 1, 1).unbind(1)
    torch.testing.assert_close(layer(x, condition), (1 + scale) * plain(x) + shift)
    untouched = ConditionalNorm(8, replace(SMALL, norm=norm))
    torch.testing.assert_close(untouched(x, condition), plain(x))


def test_attention_is_pytorchs() -> None:
    layer = randomised(SelfAttention(8, 2, replace(SMALL, norm="group")))
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(layer.to_qkv.weight[:, :, 0, 0])
        theirs.in_proj_bias.copy_(layer.to_qkv.bias)
        theirs.out_proj.weight.copy_(layer.to_out.weight[:, :, 0, 0])
        theirs.out_proj.bias.copy_(layer.to_out.bias)
    x, condition = torch.randn(3, 8, 4, 5), torch.randn(3, 8)
    tokens = layer.norm(x, condition).flatten(2).mT
    expected = x + theirs(tokens, tokens, tokens)[0].mT.reshape(x.shape)
    torch.testing.assert_close(layer(x, condition), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [28, 32, 7])
@pytest.mark.parametrize("classes", [None, 11])
def test_what_it_looks_at(side: int, classes: int | None) -> None:
    network = randomised(PixelUNet(replace(SMALL, num_class_embeds=classes, norm="group"))).double().eval()
    assert isinstance(network, Network)
    x = torch.randn(4, 3, side, side, dtype=torch.float64)
    labels = None if classes is None else torch.tensor([0, 3, 10, 3])
    out = network(x, torch.tensor([-0.4, 0.1, 0.3, 0.1]), labels)
    assert out.shape == x.shape
    row = network(x[1:2], torch.tensor([0.1]), None if labels is None else labels[1:2])
    torch.testing.assert_close(out[1:2], row)  # no picture sees another
    assert (network(x, 0.7, labels) - network(x, 0.1, labels)).abs().max() > 0.01
    if labels is not None:
        assert (network(x, 0.1, labels.roll(1)) - network(x, 0.1, labels)).abs().max() > 0.01
        with pytest.raises(ValueError, match="needs class_labels"):
            network(x, 0.1)
    else:
        with pytest.raises(ValueError, match="has no classes"):
            network(x, 0.1, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("path", ["linear", "scaled_linear", "cosine", "edm", "flow"])
def test_neighbouring_noise_levels_look_alike_to_it(path: str, picture_folder: Path) -> None:
    """And distant ones differ, on every clock: so it can know how much noise there is."""
    prediction = {"edm": "edm", "flow": "velocity"}.get(path, "v")
    config = Config(data=str(picture_folder), vae="grey", text_encoder="none", unet=SMALL, size=8)
    model = build(replace(config, path=path, prediction=prediction), None)  # type: ignore[arg-type]
    told: list[torch.Tensor] = []
    norm = next(module for module in model.unet.modules() if isinstance(module, ConditionalNorm))
    norm.register_forward_pre_hook(lambda _, given: told.append(given[1]))
    for sigma in (0.05, 0.5, 5.0):
        for near in (sigma, 1.01 * sigma, 8 * sigma):
            model.unet(torch.zeros(1, 1, 8, 8), model.schedule.timestep(near))
        here, near, far = told[-3:]
        alike = torch.cosine_similarity(torch.cat([near, far]), here)
        assert alike[0] > 0.998, sigma
        assert alike[1] < alike[0], sigma


def test_in_16_bits_it_knows_the_same_noise_levels(tmp_path: Path) -> None:
    """Its frequencies are never rounded: neither by a cast, nor in a file, nor when the file is opened in 16 bits."""
    network = PixelUNet(SMALL).eval()
    frequencies = network.frequencies.clone()
    for dtype in (torch.bfloat16, torch.int8):
        save_network(network, tmp_path, dtype)
        weights = load_file(next(tmp_path.glob("*.safetensors")))
        assert weights["conv_in.weight"].dtype == dtype
        assert weights["frequencies"].equal(frequencies)
        for opened in (torch.bfloat16, torch.float32):
            other = open_network(PixelUNet, tmp_path, opened)
            assert other.frequencies.equal(frequencies)
            assert other.dtype == opened
    for cast in (lambda: network.to(torch.bfloat16), network.half, lambda: network.to("cpu", torch.float64)):
        cast()
        assert network.frequencies.equal(frequencies)
        assert network.frequencies.dtype == torch.float32


def test_its_config_survives_and_bad_ones_are_refused() -> None:
    values = SMALL.to_dict()
    assert values["_class_name"] == "PixelUNet"
    assert PixelUNetConfig.from_dict(values) == SMALL
    for wrong, message in (
        ({"attention_heads": (0, 3)}, "3 should divide the width 16"),
        ({"layers_per_block": (1,)}, "2 entries"),
        ({"norm": "layer"}, "not implemented"),
        ({"norm": "group", "norm_num_groups": 3}, "multiples of norm_num_groups=3"),
        ({"condition_channels": 7}, "even"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **wrong)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Stand-ins for digits, 12×12, grey: a bar upright (one) or level (seven)."""
    for i in range(16):
        picture = np.zeros((12, 12), np.uint8)
        picture[(slice(1, 11), slice(5, 7)) if i % 2 else (slice(5, 7), slice(1, 11))] = 255
        folder = tmp_path / "digits" / ("one" if i % 2 else "seven")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i}.png")
    return tmp_path / "digits"


@pytest.mark.usefixtures("in_process")
def test_a_class_conditional_model_of_grey_pixels_learns_its_classes(digits: Path, tmp_path: Path) -> None:
    run = main(
        replace(
            PRESETS["fashion"],
            data=str(digits),
            output=tmp_path / "run",
            cache=tmp_path / "cache",
            unet=replace(SMALL, block_out_channels=(16, 32)),
            size=12,
            updates=250,
            batch_size=16,
            optimizer="muon",
            learning_rate=1e-2,
            schedule="cosine",
            warmup=10,
            steps=12,
            workers=0,
        )
    )
    model = load_model(run)
    assert "path 'edm'" in for_atelier_alone(model)
    on_betas = Model(model.unet, model.vae, model.conditioner, scheduler_config("scaled_linear", "v"))
    assert "layout of its own" in for_atelier_alone(on_betas)
    assert (model.unet.config.in_channels, model.unet.config.num_class_embeds) == (1, 3)
    pipe = TextToImagePipeline(model)
    pipe.set_progress_bar_config(disable=True)
    for name, upright in (("one", True), ("seven", False)):
        for image in pipe(name, num_images_per_prompt=3, seed=0, guidance_scale=2.0).images:
            grey = np.asarray(image, float)
            assert np.ptp(grey, axis=2).max() == 0  # three equal colours
            bars = grey[1:11, 5:7].mean(), grey[5:7, 1:11].mean()
            assert (bars[0] > bars[1] + 60) == upright, (name, bars)
    with pytest.raises(ValueError, match="can't be saved for diffusers"):
        pipe.save_pretrained(tmp_path / "export")


@pytest.fixture(scope="module")
def small_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of random weights that halves the sides."""
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(4, 4), latent_channels=4, norm_num_groups=2))
    save_network(vae, folder := tmp_path_factory.mktemp("autoencoder"))
    return folder


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("preset", [*LECTURE, *SMALL_SETS])
def test_presets_of_known_sets_train_and_paint_in_small(
    preset: str, digits: Path, small_vae: Path, tmp_path: Path
) -> None:
    whole = PRESETS[preset]
    unet = replace(whole.unet, block_out_channels=(8, 8, 16, 16, 16)[: len(whole.unet.block_out_channels)])
    few = {"updates": 2, "warmup": 1, "batch_size": 4, "size": 16, "steps": 2, "workers": 0, "checkpoint_every": 2}
    vae = str(small_vae) if "latent" in preset else whole.vae
    config = replace(whole, unet=unet, vae=vae, data=str(digits), output=tmp_path / "run", cache=tmp_path, **few)
    assert load_model(main(replace(config, mixed_precision=None))).size == 16


def test_presets_of_known_sets_ask_for_their_data() -> None:
    assert {PRESETS[name].data for name in [*LECTURE, *SMALL_SETS]} == {""}
    assert {train.vae.PRESETS[name].data for name in ("mnist", "mnist-elbo", "cifar10")} == {""}
    with pytest.raises(ValueError, match="--data: expected a folder of captioned pictures"):
        open_source("", 28)


def test_the_kind_of_network_follows_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["ldm.py", "--preset", "cifar10", "--unet.norm", "group", "--unet.norm-num-groups", "8"]
    )
    config = parse(type(PRESETS["cifar10"]), PRESETS, default="shapes")
    assert (config.unet.norm, config.unet.norm_num_groups) == ("group", 8)
    assert isinstance(config.unet, PixelUNetConfig)
