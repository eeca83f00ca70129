"""Weights in 8 bits: how far off they are, and that folders of them open, paint and become diffusers' again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import TextToImagePipeline
from pipelines.files import read_weights
from pipelines.folder import load_model, save_model
from pipelines.quantized import SCALE, dequantize, quantize

PROMPT = "a red circle"


def test_a_weight_is_off_by_half_a_scale_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, 3, 3, generator=generator) * torch.logspace(-4, 2, 64).view(-1, 1, 1, 1)
    back = dequantize(quantize({"weight": weight}))["weight"]
    half = weight.flatten(1).abs().amax(1) / 127 / 2
    assert ((back - weight).abs().flatten(1).amax(1) <= half * (1 + 1e-5)).all()
    # rounding is uniform over a scale: its root mean square is the scale over sqrt(12)
    error = (back - weight).flatten(1).square().mean(1).sqrt() / (2 * half / 12**0.5)
    torch.testing.assert_close(error, torch.ones(64), atol=0.15, rtol=0)


def test_what_was_rounded_once_stays() -> None:
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(1))
    once = quantize({"weight": weight})
    again = quantize(dequantize(once))
    assert torch.equal(once["weight"], again["weight"])
    torch.testing.assert_close(once[f"weight.{SCALE}"], again[f"weight.{SCALE}"])


def test_vectors_rows_of_zeros_and_counts_are_kept() -> None:
    weight = torch.zeros(3, 5)
    weight[1] = 1e-30
    given = {"weight": weight, "bias": torch.tensor([0.5, -3.0]), "count": torch.tensor([7])}
    back = dequantize(quantize(given))
    torch.testing.assert_close(back["weight"], weight)
    assert torch.equal(back["bias"], given["bias"].half())
    assert torch.equal(back["count"], given["count"])


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mid\.weight.*not finite"):
        quantize({"mid.weight": torch.tensor([[1.0, float("nan")]])})
    with pytest.raises(ValueError, match=r"bias.*float16"):
        quantize({"bias": torch.tensor([70_000.0])})


def test_a_folder_in_8_bits_opens_and_becomes_a_whole_one(tmp_path: Path, model_folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = load_model(model_folder)
    save_model(model, tmp_path / "small", torch.int8)
    unet = tmp_path / "small" / "unet"
    assert [file.name for file in unet.glob("*.safetensors")] == ["diffusion_pytorch_model.int8.safetensors"]
    assert not (tmp_path / "small" / "model_index.json").exists()

    small = TextToImagePipeline.from_pretrained(tmp_path / "small", device="cpu")
    whole, read = model.unet.state_dict(), small.model.unet.state_dict()
    for name, weight in whole.items():
        assert read[name].dtype == torch.float32
        assert (read[name] - weight).norm() <= 0.02 * weight.norm() + 1e-6, name

    small.save_pretrained(tmp_path / "whole")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "whole", safety_checker=None)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 3, "latents": latents}
    pictures = small(PROMPT, sampler="ddim", guidance_scale=7.5, **call), theirs(PROMPT, **call)
    ours, same = (np.asarray(output.images[0], dtype=float) for output in pictures)
    assert np.abs(ours - same).mean() < 1.0


def test_a_folder_is_read_as_it_was_written_last(tmp_path: Path, model_folder: Path) -> None:
    model = load_model(model_folder)
    for dtype in (torch.int8, torch.float32, torch.int8):
        save_model(model, tmp_path, dtype)
        same = all(
            torch.equal(weight, model.unet.state_dict()[name])
            for name, weight in read_weights(tmp_path / "unet").items()
        )
        assert same == (dtype is torch.float32)
