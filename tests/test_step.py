"""What one update is made of: its draws, its loss, its clipped gradient and its optimizer, each against its formula."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import ldm.unet
import train.ldm
from ldm.loss import X0, denoising_loss
from ldm.pixel_unet import PixelUNet, PixelUNetConfig
from pipelines.files import checkpoints
from pipelines.inpainting import begin
from tests.conftest import tiny_model
from tests.training import state, weights
from train.batch import Batch, draw_batch
from train.build import optimizer_for, share_statistics
from train.data import chances, permutation
from train.inpainting import EVERYTHING, draw_mask, nothing_known, shown_beside
from train.ldm import main
from train.objective import denoising
from train.settings import Config
from train.taken import Taken

pytestmark = pytest.mark.usefixtures("in_process")


class Alike:
    """A set whose every posterior is N(3, 1/4)."""

    count = 10

    def take(self, update: int, first: int, size: int, global_batch: int) -> Taken:
        mean = torch.full((size, 64, 16, 16), 3.0)
        none = torch.zeros(size, 6, dtype=torch.int64)
        return Taken(mean, torch.full_like(mean, 0.25).log(), [("a fox",)] * size, none, none[:, 0], None)


def drawn(**settings: Any) -> Batch:
    return draw_batch(Config(batch_size=4, **settings), Alike(), 2, 0, 4, torch.device("cpu"))  # type: ignore[arg-type]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_latents_are_samples_of_the_posterior_and_the_noise_is_another_draw() -> None:
    batch = drawn()
    assert float(batch.x0.mean()) == pytest.approx(3, abs=0.01)
    assert float(batch.x0.std()) == pytest.approx(0.5, rel=0.01)
    assert float(batch.noise.std()) == pytest.approx(1, rel=0.01)
    assert abs(correlation(batch.x0, batch.noise)) < 0.02


def test_offset_noise_moves_whole_channels_of_each_picture() -> None:
    """Guttenberg's noise + 0.1 randn(B, C, 1, 1)."""
    offset = drawn(offset_noise=0.1).noise - drawn().noise
    assert float(offset.std((2, 3)).max()) < 1e-6
    assert float(offset[..., 0, 0].std()) == pytest.approx(0.1, rel=0.15)
    assert abs(correlation(offset[0], offset[1])) < 0.3


def test_perturbed_inputs_see_other_noise_beside_their_targets() -> None:
    batch = drawn(perturbation=0.1)
    assert batch.noise.equal(drawn().noise)
    unseen = batch.options["seen"] - batch.noise
    assert float(unseen.std()) == pytest.approx(0.1, rel=0.01)
    assert abs(correlation(unseen, batch.noise)) < 0.02


def test_draws_are_the_same_numbers_in_every_version() -> None:
    """A run goes on after an upgrade as it would have: these numbers were written down, they are no formula's."""
    assert permutation(10, 7, 0).tolist() == [8, 9, 3, 7, 2, 5, 0, 4, 1, 6]
    found = chances(0, 0, 0, 2, 4, (1, 2, 2))
    assert found.chance.flatten().tolist() == pytest.approx([0.434880, 0.636833, 0.715560, 0.678096], abs=2e-6)
    assert found.u.tolist() == pytest.approx([0.171162, 0.285596], abs=2e-6)
    first, second = found.normal[0, 0].flatten(), found.normal[1, 1].flatten()
    assert first.tolist() == pytest.approx([-0.126582, -1.135015, -0.618342, 0.255052], abs=2e-6)
    assert second.tolist() == pytest.approx([-1.035407, 0.263426, -0.674700, 1.463384], abs=2e-6)


def test_positions_of_a_stream_see_all_noise_levels() -> None:
    """Where each position holds pictures of one file for ever."""
    seen = torch.stack([chances(0, update, 0, 4, 4, (1,), mixed=True).u for update in range(200)])
    assert (4 * seen).floor().sort(1).values.equal(torch.arange(4.0).expand(200, 4))  # still a share each
    assert (4 * seen).floor().mean(0).tolist() == pytest.approx([1.5] * 4, abs=0.3)
    parts = torch.cat([chances(0, 7, first, 2, 4, (1,), mixed=True).u for first in (0, 2)])  # of two processes
    assert parts.equal(seen[7])


# --- What an inpainting model is shown --------------------------------------------------------------------------------


def test_an_inpainting_model_is_shown_in_training_what_the_pipeline_shows_it() -> None:
    """Whose other inputs are diffusers' (tests/test_inpainting.py)."""
    model = tiny_model()
    model.unet.config = replace(model.unet.config, in_channels=9)  # all that is asked of it here
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 16, 16, generator=draw) * 2 - 1
    masks = torch.stack([draw_mask(draw, 16, 16) for _ in range(2)])
    unit = torch.randn(2, 4, 4, 4, generator=draw)
    mine = shown_beside(model.vae, pixels, masks, torch.zeros(2, 4, 4, 4))
    assert model.inpaints
    theirs = begin(model, pixels, masks, 1.0, unit, None, 14.6, 1.0).beside
    assert theirs is not None
    assert mine.shape == (2, 5, 4, 4)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    blotted = torch.where(masks.bool(), -pixels, pixels)
    assert shown_beside(model.vae, blotted, masks, torch.zeros(2, 4, 4, 4)).equal(mine)
    noisy = shown_beside(model.vae, pixels, masks, unit)
    assert noisy[:, :1].equal(mine[:, :1])
    assert not torch.allclose(noisy[:, 1:], mine[:, 1:], atol=1e-3)


def test_nothing_known_is_a_mask_of_everything() -> None:
    vae = tiny_model().vae
    everything = shown_beside(vae, torch.rand(2, 3, 16, 16), torch.ones(2, 1, 16, 16), torch.zeros(2, 4, 4, 4))
    torch.testing.assert_close(nothing_known(vae, torch.randn(2, 4, 4, 4)), everything, atol=1e-6, rtol=1e-5)


def test_masks_are_white_where_to_paint_some_of_them_everywhere() -> None:
    draw = torch.Generator().manual_seed(0)
    masks = torch.stack([draw_mask(draw, 24, 32) for _ in range(400)])
    assert masks.shape == (400, 1, 24, 32)
    assert masks.unique().tolist() == [0, 1]
    shares = masks.mean((1, 2, 3))
    assert float((shares == 1).float().mean()) == pytest.approx(EVERYTHING, abs=0.07)
    assert 0.1 < float(shares[shares < 1].mean()) < 0.9


# --- The loss and what follows it -------------------------------------------------------------------------------------


def test_the_settings_reach_the_loss() -> None:
    model = tiny_model()
    draw = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 4, 4, 4, generator=draw) for _ in range(2))
    sigma, told = torch.tensor([0.2, 1.0, 5.0]), model.conditioner(["a fox"] * 3)
    for huber in (0.0, 0.1):
        goal = denoising(model, Config(huber=huber), model.conditioner)
        wanted = denoising_loss(model.denoiser, x0, told, sigma, noise, X0(), huber=huber)
        torch.testing.assert_close(goal.loss(model.denoiser, x0, told, sigma, noise, X0()), wanted)
    assert not torch.allclose(wanted, denoising_loss(model.denoiser, x0, told, sigma, noise, X0()), rtol=0.1)
    cases = {"min_snr": {"min_snr_gamma": 2.0}, "debiased": {}, "x0": {}}
    values = {"min_snr": [2.0, 1.0, 0.04], "debiased": [5.0, 1.0, 0.2], "x0": [1.0, 1.0, 1.0]}
    for weight, settings in cases.items():
        goal = denoising(model, Config(weight=weight, **settings), model.conditioner)  # type: ignore[arg-type]
        assert goal.weight(sigma).tolist() == pytest.approx(values[weight])
    log_normal = denoising(model, Config(noise="log_normal", noise_mean=0.3, noise_std=1.5), model.conditioner)
    u = torch.tensor([0.5, 0.841345])  # the median, and one deviation above it
    assert log_normal.sigma(u).log().tolist() == pytest.approx([0.3, 1.8], abs=1e-3)


def test_the_gradient_is_clipped(latents: Config, tmp_path: Path) -> None:
    """After one update AdamW's mean is a tenth of the gradient that it got."""
    for clip in (1e-3, 1e9):
        run = main(replace(latents, output=tmp_path / f"{clip}", updates=1, optimizer="adamw", clip=clip))
        means = [s["exp_avg"] for s in state(run)["optimizer"]["state"].values()]
        norm = float(torch.cat([mean.flatten() for mean in means]).norm())
        assert norm == pytest.approx(1e-4, rel=1e-3) if clip < 1 else norm > 1e-3


def test_batch_norms_of_several_gpus_see_the_whole_batch() -> None:
    """By names that stay, so that a checkpoint does not tell how many there were."""
    network = PixelUNet(PixelUNetConfig(block_out_channels=(8, 16), layers_per_block=(1, 1), attention_heads=(0, 2)))
    names, said = list(network.state_dict()), []
    one, two = (SimpleNamespace(num_processes=n, device=torch.device("cpu"), print=said.append) for n in (1, 2))
    for accelerator in (one, two):
        share_statistics(network, accelerator)  # type: ignore[arg-type]
        assert not any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    assert len(said) == 1
    assert "batch norms see the share" in said[0]
    share_statistics(network, SimpleNamespace(num_processes=2, device=torch.device("cuda")))  # type: ignore[arg-type]
    assert list(network.state_dict()) == names
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weight_decay_reaches_the_optimizer(optimizer: str) -> None:
    """Without a gradient it is all that moves the weights, by a share of rate × decay."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"conv_in": nn.Conv2d(3, 8, 3), "hidden": nn.Linear(8, 8)})
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    config = Config(optimizer=optimizer, learning_rate=0.5, weight_decay=0.1)  # type: ignore[arg-type]
    optimizer_for(network, config, Accelerator(cpu=True)).step()
    for name, weight in network.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] * (1 - 0.5 * 0.1))


def test_eight_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes \(.*\): install it, or take adamw"):
        optimizer_for(nn.Linear(2, 2), Config(optimizer="adamw8bit"), Accelerator(cpu=True))


def test_a_run_with_eight_bits(latents: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes would be given, which has no processor to run on here."""
    given: list[dict] = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, weights: list[nn.Parameter], rate: float, **settings: Any) -> None:
            given.append({"rate": rate, **settings, "contiguous": all(w.is_contiguous() for w in weights)})
            super().__init__(weights, rate, **settings)

    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(AdamW8bit=AdamW8bit))
    config = replace(latents, output=tmp_path / "run", optimizer="adamw8bit", learning_rate=1e-3, weight_decay=0.1)
    main(config)
    assert given[-1] == {"rate": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "contiguous": True}
    assert checkpoints(config.output)


def test_gradient_checkpointing_is_done(latents: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And changes nothing but the memory."""
    plain = weights(main(replace(latents, output=tmp_path / "plain", updates=1)))
    kept, calls = ldm.unet.checkpoint, []
    monkeypatch.setattr(ldm.unet, "checkpoint", lambda *args, **named: calls.append(1) or kept(*args, **named))
    saving = weights(main(replace(latents, output=tmp_path / "saving", updates=1, gradient_checkpointing=True)))
    assert len(calls) >= 2 * 5  # the rehearsal's and the update's: two blocks down, the middle, two up
    for name, weight in plain.items():
        torch.testing.assert_close(saving[name], weight, atol=1e-5, rtol=1e-4)


def test_a_compiled_network_trains_as_the_plain_one(
    latents: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By TorchDynamo with its eager backend: what it captures and renames, without a compiler."""
    compiled, kept = [], torch.compile

    def compile_(network: nn.Module, **options: Any) -> Any:
        compiled.append(network)
        return kept(network, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_)
    plain = weights(main(replace(latents, output=tmp_path / "plain")))
    assert not compiled
    fast = weights(main(replace(latents, output=tmp_path / "fast", compile=True)))
    assert len(compiled) == 1
    assert fast.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(fast[name], weight, atol=1e-5, rtol=1e-4)


def test_what_is_looked_at_is_the_average(latents: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and samples are of the averaged weights, as what a checkpoint shows."""
    seen: list[Tensor] = []
    validate, paint = train.ldm.validate, train.ldm.paint_grid

    def noted(function: Any) -> Any:
        def call(model: Any, *args: Any) -> Any:
            seen.append(model.unet.conv_out.weight.detach().clone())
            return function(model, *args)

        return call

    monkeypatch.setattr(train.ldm, "validate", noted(validate))
    monkeypatch.setattr(train.ldm, "paint_grid", noted(paint))
    run = main(replace(latents, output=tmp_path, updates=3, learning_rate=0.1, ema_decay=0.9))
    average, last = weights(run)["conv_out.weight"], state(run)["weights"]["unet.conv_out.weight"]
    assert not torch.allclose(average, last, atol=1e-4)
    for weight in seen[-2:]:
        np.testing.assert_allclose(weight, average, atol=1e-6)
