"""The mean of a step as prediction, in the papers' units: equation 7 of DDPM, diffusers, and its own inverse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from torch import nn

from ldm.denoiser import Denoiser, row_before
from ldm.forward import posterior_variance
from ldm.loss import DiscreteELBO, Plain, denoising_loss
from ldm.samplers import ddpm
from ldm.schedule import EDM, RectifiedFlow, VariancePreserving
from pipelines import TextToImagePipeline
from pipelines.folder import for_atelier_alone, load_model
from train.ldm import main
from train.settings import SMALL, Config

TABLES = {
    "linear": VariancePreserving.linear(),
    "scaled_linear": VariancePreserving.scaled_linear(),
    "cosine": VariancePreserving.cosine(),
}
VP = TABLES["linear"]
ROWS = [0, 1, 2, 37, 500, 998, 999]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Fixed(nn.Module):
    """A network that puts out what it is told to."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, sample, timestep):
        self.seen = sample, timestep
        return self.output


@pytest.mark.parametrize("name", TABLES)
def test_the_target_is_equation_7_and_leads_back_to_x0(name):
    table = TABLES[name]
    sigma = table.table[ROWS]
    x0, noise = draw(len(ROWS), 2, 3, 3), draw(len(ROWS), 2, 3, 3, seed=1)
    denoiser = Denoiser(nn.Identity(), table, "mean")
    target = denoiser.network_target(x0, noise, sigma)
    bars = table.alphas_cumprod
    for row, x, eps, got in zip(ROWS, x0, noise, target, strict=True):
        bar, before = bars[row], bars[row - 1] if row else torch.tensor(1.0, dtype=torch.float64)
        beta = 1 - bar / before
        x_t = bar.sqrt() * x + (1 - bar).sqrt() * eps
        mean = (before.sqrt() * beta * x + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - bar)
        torch.testing.assert_close(got, mean, rtol=1e-4, atol=1e-6)
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(denoiser.to_sample(x, target, sigma), x0, rtol=1e-9, atol=1e-9)
    output = draw(len(ROWS), 2, 3, 3, seed=2)
    back = denoiser.to_output(x, denoiser.to_sample(x, output, sigma), sigma)
    torch.testing.assert_close(back, output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("row", [1, 2, 500, 999])
def test_a_step_of_diffusers_goes_to_what_the_network_puts_out(row):
    """Its own mean of a step, around which it adds noise, is F; and ours is F over alpha of the row before."""
    scheduler = DDPMScheduler(beta_schedule="linear", prediction_type="sample", clip_sample=False)
    x_t, output = draw(2, 3, 4, 4, dtype=torch.float32), draw(2, 3, 4, 4, seed=1, dtype=torch.float32)
    sigma, lower = VP.table[[row, row - 1]].tolist()
    denoiser = Denoiser(Fixed(output), VP, "mean")
    x = x_t / VP.alpha(sigma)
    x0 = denoiser(x, sigma)
    torch.testing.assert_close(denoiser.network.seen[0], x_t)
    assert denoiser.network.seen[1].tolist() == [row, row]
    scheduler.set_timesteps(1000)
    theirs = scheduler.step(x0, row, x_t, generator=torch.Generator().manual_seed(3)).prev_sample
    added = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3))
    theirs = theirs - scheduler._get_variance(row) ** 0.5 * added
    torch.testing.assert_close(theirs, output, rtol=1e-3, atol=2e-3)
    ours = ddpm(denoiser, x, [sigma, lower], noise=torch.zeros_like)
    torch.testing.assert_close(VP.alpha(lower) * ours, output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TABLES)
def test_single_precision_is_enough(name):
    """c_out reaches 7,800: what a float32 network rounds comes back so many times larger."""
    table = TABLES[name]
    x0, noise = draw(1000, 16), draw(1000, 16, seed=1)
    denoiser = Denoiser(nn.Identity(), table, "mean")
    target = denoiser.network_target(x0, noise, table.table)
    x = x0 + table.table[:, None] * noise
    back = denoiser.to_sample(x.float(), target.float(), table.table.float())
    assert float((back - x0).abs().max()) < 0.02
    assert float((back - x0).std()) < 1e-3


@pytest.mark.parametrize("name", TABLES)
def test_between_rows_the_level_before_is_continuous_and_below(name):
    table = TABLES[name]
    torch.testing.assert_close(row_before(table, table.table)[1:], table.table[:-1], rtol=1e-12, atol=0)
    assert float(row_before(table, table.table[:1])) == 0
    sigma = table.sigma(torch.linspace(0, 999, 40_001, dtype=torch.float64))
    lower = row_before(table, sigma)
    assert bool((lower < sigma).all())
    assert bool((lower.diff() > 0).all())
    # No jump: no part of a fortieth of a row changes it by more than a row's share of the steepest one nearby.
    assert float((lower.diff() / sigma[1:]).max()) < 0.09
    below = torch.tensor([0.5, 0.01]).double() * table.sigma_min
    assert row_before(table, below).tolist() == [0, 0]
    c_skip, c_out = Denoiser(nn.Identity(), table, "mean").coefficients(below)
    assert c_skip.tolist() == [0, 0]  # there F is x_0 itself
    assert c_out.tolist() == [1, 1]


def test_the_plain_weight_is_the_papers_term_times_twice_its_variance():
    """DDPM's equation 8: L_t = |mean - F|² / (2 sigma_t²), with the small variance, in the papers' units."""
    denoiser, sigma = Denoiser(nn.Identity(), VP, "mean"), VP.table[1:]
    lower = VP.table[:-1]
    variance = VP.alpha(lower) ** 2 * posterior_variance(sigma, lower)
    torch.testing.assert_close(Plain(denoiser)(sigma), 2 * variance * DiscreteELBO(VP)(sigma), rtol=1e-9, atol=0)
    x0, noise, output = draw(999, 4), draw(999, 4, seed=1), draw(999, 4, seed=2)
    fixed = Denoiser(Fixed(output), VP, "mean")
    loss = denoising_loss(fixed, x0, None, sigma, noise, Plain(fixed))
    square = (output - denoiser.network_target(x0, noise, sigma)).square().mean(1)
    torch.testing.assert_close(loss, square, rtol=1e-6, atol=1e-9)


class Slopes(nn.Module):
    """F = slope of the row * x_t."""

    def __init__(self, rows):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(rows, dtype=torch.float64))

    def forward(self, sample, timestep):
        return self.slope[timestep.round().long()].view(-1, 1) * sample


@pytest.mark.parametrize("weight", [Plain, lambda denoiser: DiscreteELBO(denoiser.schedule)])
def test_trained_it_becomes_the_denoiser(weight):
    """On N(0, s²), under the plain weight and the bound's own: D is s² / (s² + sigma²) x."""
    table, s = VariancePreserving(torch.linspace(0.02, 0.6, 6, dtype=torch.float64)), 0.6
    denoiser = Denoiser(Slopes(6), table, "mean")
    sigma = table.table.repeat_interleave(2)
    x0, noise = s * torch.ones(12, 1).double(), torch.tensor([1.0, -1.0]).double().repeat(6)[:, None]
    optimizer = torch.optim.LBFGS(
        denoiser.parameters(), max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = denoising_loss(denoiser, x0, None, sigma, noise, weight(denoiser)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    x = draw(6, 1)
    expected = s**2 / (s**2 + table.table**2)[:, None] * x
    torch.testing.assert_close(denoiser(x, table.table), expected, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused_by_name():
    for schedule in (RectifiedFlow(), EDM(1.0)):
        with pytest.raises(ValueError, match=f"of a beta table, VariancePreserving; got {type(schedule).__name__}"):
            Denoiser(nn.Identity(), schedule, "mean")
    for table in TABLES.values():
        with pytest.raises(ValueError, match=r"ends in pure noise.*an error of mean grows"):
            Denoiser(nn.Identity(), table.zero_terminal_snr(), "mean")
    x = draw(1, 3, 4, 4, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=r"half precision.*float32"):
            Denoiser(Fixed(x.to(dtype)), VP, "mean")(x, 1.0)


@pytest.mark.usefixtures("in_process")
def test_trained_and_saved_for_atelier_alone(picture_folder: Path, tmp_path: Path):
    config = Config(
        data=str(picture_folder),
        output=tmp_path / "run",
        cache=tmp_path / "cache",
        vae="none",
        text_encoder="none",
        unet=replace(SMALL, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=2),
        size=16,
        path="linear",
        prediction="mean",
        noise="uniform",
        weight="elbo",
        updates=2,
        batch_size=4,
        warmup=1,
        steps=2,
        workers=0,
    )
    model = load_model(main(config))
    assert model.prediction == "mean"
    assert "predicts the mean" in for_atelier_alone(model)
    folder = next((tmp_path / "run").glob("checkpoint-*"))
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "mean"
    assert not (folder / "model_index.json").exists()
    pipe = TextToImagePipeline(model)
    pipe.set_progress_bar_config(disable=True)
    assert bool(pipe("", steps=3, seed=0, sampler="ddpm", output_type="latent").images.isfinite().all())
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="--mixed-precision no"):
        main(replace(config, output=tmp_path / "half", mixed_precision="bf16"))
