"""The autoencoder against diffusers' AutoencoderKL on the same weights."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vae.autoencoder import Autoencoder, AutoencoderConfig, Identity, Posterior

SMALL: dict[str, Any] = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "latent_channels": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "KL-f8 in miniature": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 2},
    "shift, no attention": {"shift_factor": 0.3, "scaling_factor": 1.7, "mid_block_add_attention": False},
    "no 1x1 convolutions": {"use_quant_conv": False, "use_post_quant_conv": False},
    "one level, grey": {"block_out_channels": (8,), "in_channels": 1, "out_channels": 2},
}
# The `vae/config.json` of Stable Diffusion 1.5, 2.1 and, with shift_factor, of its later 16-channel kind.
SD = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD_3 = {
    **SD,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
}


def pair(**changes) -> tuple[Autoencoder, Any]:
    """Ours and diffusers' with the same weights, passed both ways through strict loads."""
    torch.manual_seed(0)
    ours = Autoencoder(AutoencoderConfig(**{**SMALL, **changes}))
    theirs = AutoencoderKL.from_config(ours.config.to_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for parameter in ours.parameters():  # new norms are all ones and zeros, which would hide a swap
        parameter.data += 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else 0
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def pictures(model: Autoencoder, size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.rand(2, model.config.in_channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("at_once", [100, 800, 2**16])
def test_parts_of_a_batch_are_the_batch(at_once, monkeypatch):
    """However few pixels are worked on at once, also fewer than one picture has."""
    monkeypatch.setattr("vae.autoencoder.PIXELS_AT_ONCE", at_once)
    ours, _ = pair()
    images = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole = ours.encode(images).mean  # with gradients all are taken at once
    with torch.no_grad():
        close(ours.encode(images).mean, whole.detach())
        close(ours.decode(whole), ours.requires_grad_(False).decode(whole))


@pytest.mark.parametrize("name", CONFIGS)
def test_encode_and_decode_equal_diffusers_with_the_scaling_inside(name):
    ours, theirs = pair(**CONFIGS[name])
    images = pictures(ours)
    scale, shift = ours.config.scaling_factor, ours.config.shift_factor or 0.0
    posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
    noise = torch.randn_like(posterior.mean)
    close(posterior.mean, (expected.mean - shift) * scale)
    close(posterior.mode, (expected.mode() - shift) * scale)
    close(posterior.sample(noise), (expected.mean + expected.std * noise - shift) * scale)
    close(posterior.logvar.exp(), expected.var * scale**2)
    close(posterior.kl(), expected.kl(), 1e-3)
    latents = torch.randn_like(posterior.mean)
    close(ours.decode(latents), theirs.decode(latents / scale + shift).sample)
    assert images.shape[2] == latents.shape[2] * ours.downscale
    assert latents.shape[1] == ours.latent_channels


def test_extreme_log_variances_are_bounded_as_in_diffusers():
    ours, theirs = pair()
    for model in (ours, theirs):
        model.state_dict()["quant_conv.bias"][3:5] = torch.tensor([90.0, -90.0])
    images = pictures(ours)
    expected = theirs.encode(images).latent_dist.logvar + 2 * math.log(0.18215)
    close(ours.encode(images).logvar, expected)


def test_gradients_equal_diffusers():
    ours, theirs = pair(**CONFIGS["KL-f8 in miniature"])
    images = pictures(ours)
    noise = torch.randn(2, 3, 2, 3)
    scale = ours.config.scaling_factor
    output, posterior, _ = ours(images, noise)
    (output.square().sum() + 0.1 * posterior.kl().sum()).backward()
    q = theirs.encode(images).latent_dist
    output2 = theirs.decode(q.mean + q.std * noise).sample
    (output2.square().sum() + 0.1 * q.kl().sum()).backward()
    close(output, output2)
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, expected[key], 1e-4 * max(1.0, expected[key].abs().max().item()))
    assert scale == 0.18215
    assert ours.last_layer is ours.decoder.conv_out.weight
    assert torch.equal(ours(images)[0], ours.decode(ours.encode(images).mode))


def test_latents_of_half_the_resolution_are_those_of_the_same_sample():
    ours, _ = pair()
    images, noise = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, 3, 4, 6)
    output, posterior, halved = ours(images, noise, halved=True)
    close(ours(images, noise, added=noise)[0], ours.decode(posterior.sample(noise) + noise))
    assert halved.shape == (2, 3, 8, 12)
    latents = posterior.sample(noise)
    close(output, ours.decode(latents))
    pooled = latents.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    close(halved, ours.decode(pooled))
    for turns in (1, 2, 3):
        turned = ours(images, noise, halved=True, turns=turns)[2]
        close(turned.rot90(turns, (2, 3)), ours.decode(pooled.rot90(turns, (2, 3))))
    assert ours(images, noise)[2] is None


def test_norms_have_the_eps_of_diffusers():
    ours, theirs = pair()
    eps = {k: m.eps for k, m in theirs.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    assert eps == {k: m.eps for k, m in ours.named_modules() if isinstance(m, torch.nn.GroupNorm)}


@pytest.mark.parametrize("config", [SD, SD_3], ids=["SD 1.x and 2.x", "SD 3"])
def test_published_configs_have_the_same_keys_and_shapes(config):
    with torch.device("meta"):
        ours, theirs = Autoencoder.from_config(config), AutoencoderKL.from_config(config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.downscale == 8


def test_defaults_and_keys_are_those_of_diffusers():
    with torch.device("meta"):
        model: Any = AutoencoderKL()
    theirs = dict(model.config)
    config = AutoencoderConfig.from_dict(theirs)
    assert config == AutoencoderConfig()
    assert {k for k in theirs if not k.startswith("_")} == {f.name for f in dataclasses.fields(config)} | {
        *config.fixed
    }
    assert AutoencoderConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latents_mean", [0.0, 0.0, 0.0]),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("act_fn", "gelu"),
        ("norm_num_groups", 3),
        ("scaling_factor", 0.0),
        ("no_such_key", 1),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key if key != "norm_num_groups" else "norm_num_groups=3"):
        AutoencoderConfig.from_dict({**SMALL, key: value})


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="AutoencoderTiny"):
        AutoencoderConfig.from_dict({"_class_name": "AutoencoderTiny"})


def test_old_attention_keys_load():
    ours, _ = pair()
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = dict(ours.state_dict())
    for new_name, old_name in names.items():
        old = {k.replace(new_name, old_name): v for k, v in old.items()}
    assert sum("proj_attn" in key for key in old) == 4
    fresh = Autoencoder(ours.config)
    fresh.load_state_dict(old, strict=True)
    images = pictures(ours)
    assert torch.equal(fresh.encode(images).mean, ours.encode(images).mean)


@pytest.mark.parametrize("changes", [{}, {"shift_factor": 0.4, "scaling_factor": 0.7}])
def test_folded_statistics_normalise_the_latents_and_leave_the_pictures(changes):
    ours, _ = pair(**changes)
    ours.double()
    images = torch.rand(32, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = torch.randn(32, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before, pictures_before = ours.encode(images), ours(images, noise)[0]
        latents = before.mean
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        assert (mean.abs() > 0.01).all()
        ours.fold_latent_statistics(mean, std)
        after = ours.encode(images)
        column = (slice(None), None, None)
        close(after.mean, (before.mean - mean[column]) / std[column], 1e-12)
        close(after.logvar, before.logvar - 2 * std[column].log(), 1e-12)
        close(after.mean.mean((0, 2, 3)), torch.zeros(3).double(), 1e-12)
        close(after.mean.std((0, 2, 3)), torch.ones(3).double(), 1e-12)
        close(ours(images, noise)[0], pictures_before, 1e-11)
    # What is written for other tools is right with their scaling alone.
    theirs = AutoencoderKL.from_config(ours.config.to_dict()).double()
    theirs.load_state_dict(ours.state_dict())
    scale, shift = ours.config.scaling_factor, ours.config.shift_factor or 0.0
    close((theirs.encode(images).latent_dist.mean - shift) * scale, after.mean, 1e-10)


def test_folding_refuses_what_it_cannot_do():
    ours, _ = pair()
    for mean, std in (([0.0] * 3, [1.0, 0.0, 1.0]), ([0.0] * 2, [1.0] * 2), ([math.nan] * 3, [1.0] * 3)):
        with pytest.raises(ValueError, match=r"Expected 3|positive"):
            ours.fold_latent_statistics(torch.tensor(mean), torch.tensor(std))
    ours, _ = pair(**CONFIGS["no 1x1 convolutions"])
    with pytest.raises(ValueError, match="quant_conv"):
        ours.fold_latent_statistics(torch.zeros(3), torch.ones(3))


def test_kl_is_that_of_the_raw_latent_in_nats():
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    close(Posterior(mean, logvar).kl(), expected)
    shift, scale = 0.7, 0.2
    scaled = Posterior((mean - shift) * scale, logvar + 2 * math.log(scale), shift, scale)
    close(scaled.kl(), expected)


def test_samples_have_the_posterior_mean_and_variance():
    posterior = Posterior(torch.tensor(2.0), torch.tensor(9.0).log())
    noise = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    sample = posterior.sample(noise)
    assert abs(sample.mean().item() - 2) < 0.05
    assert abs(sample.std().item() - 3) < 0.05


def test_sides_must_be_multiples_of_the_downscale():
    ours, _ = pair()
    for shape in ((1, 3, 16, 18), (1, 3, 15, 16), (1, 1, 16, 16), (3, 16, 16), (1, 3, 0, 16)):
        with pytest.raises(ValueError, match="multiples of 4"):
            ours.encode(torch.zeros(shape))


def test_identity_is_the_pixel_space():
    identity = Identity()
    images = torch.rand(2, 3, 5, 7)
    posterior = identity.encode(images)
    assert torch.equal(posterior.sample(torch.randn_like(images)), images)
    assert torch.equal(identity.decode(posterior.mode), images)
    assert (identity.downscale, identity.latent_channels) == (1, 3)
    assert Identity(channels=1).encode(images[:, :1]).mean.shape == (2, 1, 5, 7)
    with pytest.raises(ValueError, match="3, H, W"):
        identity.encode(images[:, :2])


def test_identity_of_grey_pictures():
    grey, coloured = torch.rand(2, 1, 5, 7).expand(-1, 3, -1, -1), torch.rand(2, 3, 5, 7)
    identity = Identity(channels=1)
    assert identity.encode(coloured).mean.equal(coloured.mean(1, keepdim=True))
    torch.testing.assert_close(identity.decode(identity.encode(grey).mode), grey)
    with pytest.raises(ValueError, match="1, H, W"):
        identity.encode(coloured[:, :2])


def test_memory_format_is_kept():
    ours, _ = pair(**CONFIGS["KL-f8 in miniature"])
    images = pictures(ours)
    expected, latents = ours(images)[0], ours.encode(images).mean
    ours.to(memory_format=torch.channels_last)
    assert ours.encoder(images).is_contiguous(memory_format=torch.channels_last)
    output = ours.decode(latents)
    assert output.is_contiguous(memory_format=torch.channels_last)
    close(output, expected)


def test_runs_under_autocast_in_bfloat16_and_compiled():
    ours, _ = pair()
    images = pictures(ours)
    expected = ours(images)[0].detach()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    close(compiled(images)[0], expected, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        output, posterior, _ = ours(images)
        output.float().square().sum().backward()
    assert posterior.mean.dtype == torch.float32
    ours.bfloat16()  # pictures and latents stay float32 outside
    half, posterior, _ = ours(images)
    assert (half.dtype, posterior.mean.dtype) == (torch.bfloat16, torch.float32)
    for result in (output, half):
        assert (result.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
