"""Learned variance: its term of the bound against torch and `ldm.elbo`, its optimum against a closed form, what its
gradient reaches, and sampling against diffusers' scheduler, from the same folder on the same noise."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from torch.distributions import kl_divergence

from ldm.denoiser import Denoiser
from ldm.elbo import ancestral_step, elbo, gaussian_log_likelihood
from ldm.forward import posterior
from ldm.guidance import classifier_free
from ldm.likelihood import bits_per_dim
from ldm.loss import DiscreteELBO, HybridLoss, Plain, denoising_loss, step_divergence
from ldm.samplers import ddpm
from ldm.schedule import EDM, RectifiedFlow, VariancePreserving
from ldm.unet import UNet
from pipelines import TextToImagePipeline
from pipelines.files import checkpoints
from pipelines.folder import Model, for_atelier_alone, load_model, save_model, scheduler_config
from tests.conftest import tiny_model
from train.ldm import main
from train.objective import denoising
from train.settings import SMALL, Config

T = 6
TABLE = VariancePreserving(torch.linspace(0.02, 0.6, T, dtype=torch.float64))
SIGMAS = TABLE.table
PAIRS = list(zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist(), strict=True))  # (lower, sigma)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Network(nn.Module):
    """A convolution from 2 channels to 4: the mean, and the variance."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, dtype=torch.float64)
        with torch.no_grad():
            self.conv.weight.copy_(draw(4, 2, 3, 3, seed=9) / 5)

    def forward(self, sample, timestep):
        return torch.sin(self.conv(sample)) + timestep.view(-1, 1, 1, 1) / 10


# --- The term of the bound --------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_the_two_normals():
    x0, noise, v = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1), 1.5 * draw(3, 2, 4, 4, seed=2)
    estimate = x0 + draw(3, 2, 4, 4, seed=3) / 3
    for lower, sigma in PAIRS:
        x, level = x0 + sigma * noise, torch.full((3,), sigma, dtype=torch.float64)
        step = ancestral_step(lambda x, sigma: estimate, lambda x, sigma: v)(x, sigma, lower)
        expected = kl_divergence(posterior(x, x0, sigma, lower), step).flatten(1).mean(1)
        torch.testing.assert_close(step_divergence(x0, estimate, v, level, TABLE), expected)
        fixed = step_divergence(x0, estimate, torch.zeros_like(v), level, TABLE)
        square = (x0 - estimate).square().flatten(1).mean(1)
        torch.testing.assert_close(fixed, DiscreteELBO(TABLE)(level) * square)
    first = SIGMAS[:1].expand(3)  # its step goes to x_0 without noise, whatever the network says
    assert step_divergence(x0, estimate, v, first, TABLE).tolist() == [0, 0, 0]


def test_over_all_rows_it_is_the_denoising_term_of_the_elbo():
    denoiser, values = Denoiser(Network(), TABLE, "epsilon"), 2 * 4 * 4
    x0, noise = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    with denoiser.learned_variance() as variance:
        step = ancestral_step(denoiser, variance)
        bound = elbo(step, x0, TABLE, lambda x: noise, log_likelihood=gaussian_log_likelihood)
    loss, weight = HybridLoss(denoiser), Plain(denoiser)
    rows = [s.expand(3) for s in SIGMAS]
    with_term = sum(loss(denoiser, x0, None, s, noise, weight) for s in rows)
    without = sum(denoising_loss(denoiser, x0, None, s, noise, weight) for s in rows)
    vlb = (with_term - without) / (0.001 * T)  # each row is one of T draws
    torch.testing.assert_close(bits_per_dim(-vlb, 1), bits_per_dim(-bound.denoising, values))
    fixed = elbo(ancestral_step(denoiser), x0, TABLE, lambda x: noise, log_likelihood=gaussian_log_likelihood)
    assert not torch.allclose(fixed.denoising, bound.denoising)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "mean"])
def test_the_bound_moves_the_variance_alone_and_the_square_error_the_mean(prediction):
    denoiser = Denoiser(Network(), TABLE, prediction)
    x0, noise, sigma = draw(4, 2, 4, 4), draw(4, 2, 4, 4, seed=1), SIGMAS[[1, 2, 4, 5]]
    weight = Plain(denoiser)

    def gradient(loss):
        denoiser.zero_grad()
        loss.mean().backward()
        return denoiser.network.conv.weight.grad.clone()

    hybrid = gradient(HybridLoss(denoiser)(denoiser, x0, None, sigma, noise, weight))
    simple = gradient(denoising_loss(denoiser, x0, None, sigma, noise, weight))
    torch.testing.assert_close(hybrid[:2], simple[:2])
    assert not simple[2:].any()
    x = x0 + sigma.view(4, 1, 1, 1) * noise
    with denoiser.learned_variance() as variance:
        estimate = denoiser(x, sigma)
        divergence = step_divergence(x0, estimate, variance(x, sigma), sigma, TABLE)
    both = gradient(0.001 * T * divergence)
    assert both[:2].any()  # it would reach the mean, were that not stopped
    torch.testing.assert_close(hybrid[2:], both[2:])


# --- Its optimum ------------------------------------------------------------------------------------------------------


class PerRow(nn.Module):
    """The exact denoiser of N(mean, std²), and a variance for each row that is learned."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std
        self.variance = nn.Parameter(torch.zeros(T, dtype=torch.float64))

    def forward(self, sample, timestep):
        sigma = TABLE.sigma(timestep).view(-1, 1)
        x = sample / TABLE.alpha(sigma)
        x0 = self.mean + self.std**2 / (self.std**2 + sigma**2) * (x - self.mean)
        return torch.cat([x0, self.variance[timestep.round().long()].view(-1, 1)], dim=1)


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (0.0, 1.0), (-1.0, 0.02)])
def test_the_learned_variance_is_that_of_the_true_posterior(mean, std):
    """Of x_s given x_t alone, for N(mean, std²): precisions of x_s, and of x_t given x_s, add up."""
    network = PerRow(mean, std)
    denoiser = Denoiser(network, TABLE, "sample")
    sigma = SIGMAS[1:].repeat_interleave(2)
    spread = std * sigma / (std**2 + sigma**2).sqrt()  # of x_0 given x
    x = mean + 1.3 * draw(2 * T - 2)
    # Two values of x_0 at each x, which have the mean and the variance that it has there: all that the loss depends on.
    x0 = mean + std**2 / (std**2 + sigma**2) * (x - mean) + spread * torch.tensor([1.0, -1.0]).repeat(T - 1)
    batch = x0[:, None], None, sigma, ((x - x0) / sigma)[:, None], Plain(denoiser)
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = HybridLoss(denoiser, factor=1.0)(denoiser, *batch).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad(), denoiser.learned_variance() as variance:
        for lower, sigma in PAIRS:
            learned = ancestral_step(denoiser, variance)(draw(3, 1), sigma, lower).variance
            exact = 1 / (1 / (std**2 + lower**2) + 1 / (sigma**2 - lower**2))
            torch.testing.assert_close(learned, torch.full((3, 1), exact, dtype=torch.float64), rtol=1e-4, atol=0)
    v = (network.variance.detach()[1:] + 1) / 2
    assert bool(((v > -1e-4) & (v < 1 + 1e-4)).all())  # between the two fixed ones
    if std == 1:
        torch.testing.assert_close(v, torch.ones_like(v), rtol=1e-4, atol=1e-4)


# --- One run of the network -------------------------------------------------------------------------------------------


class Guided(nn.Module):
    """Tells the rows of a batch apart by their label, and counts its runs."""

    runs = 0

    def forward(self, sample, timestep, class_labels):
        self.runs += 1
        label = class_labels.view(-1, 1, 1, 1).to(sample)
        return torch.cat([torch.sin(sample + label), torch.cos(3 * sample) - label], dim=1)


def test_the_variance_is_the_conditions_and_shares_the_run():
    network = Guided()
    denoiser, x = Denoiser(network, TABLE, "v"), draw(3, 2, 4, 4)
    cond, uncond = {"class_labels": torch.ones(3)}, {"class_labels": torch.zeros(3)}
    alone = network(TABLE.alpha(1.0) * x, None, **cond)[:, 2:]
    for scale, interval in ((4.0, None), (1.0, None), (4.0, (2.0, 3.0))):
        network.runs = 0
        with denoiser.learned_variance() as variance:
            classifier_free(denoiser, cond, uncond, scale, interval=interval)(x, 1.0)
            torch.testing.assert_close(variance(x, 1.0), (alone + 1) / 2)
        assert network.runs == 1
    assert not network._forward_hooks


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_sampling_is_that_of_diffusers(prediction):
    table = VariancePreserving.linear()
    scheduler = DDPMScheduler(
        beta_schedule="linear", variance_type="learned_range", prediction_type=prediction, clip_sample=False
    )
    denoiser = Denoiser(Guided(), table, prediction.removesuffix("_prediction"))
    context = {"class_labels": torch.ones(2)}
    start, steps = draw(2, 2, 4, 4, dtype=torch.float32), 20
    scheduler.set_timesteps(steps)
    theirs, generator, seen = start, torch.Generator().manual_seed(7), []
    for t in scheduler.timesteps:
        output = Guided()(theirs, t, **context)
        theirs = scheduler.step(output, t, theirs, generator=generator).prev_sample
        seen.append(theirs)
    sigmas = torch.cat([table.table[scheduler.timesteps], torch.zeros(1)])
    generator, ours = torch.Generator().manual_seed(7), []
    with denoiser.learned_variance() as variance:
        end = ddpm(
            lambda x, sigma: denoiser(x, sigma, context),
            start / table.alpha(sigmas[0]).float(),
            sigmas,
            variance=variance,
            noise=lambda x: torch.randn(x.shape, generator=generator),
            # the network may be run for a look at the estimate, too, without a word to the sampler
            callback=lambda i, sigma, x, x0: (ours.append(table.alpha(sigma) * x), denoiser(x0, 0.1, context)),
        )
    for got, wanted in zip([*ours[1:], end], seen, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


# --- Folder, pipeline, training ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned_model() -> Model:
    """Random weights; a text U-Net of twice the channels, whose variance is not all in the middle."""
    model = tiny_model()
    torch.manual_seed(3)
    unet = UNet(replace(model.unet.config, out_channels=8)).eval().requires_grad_(False)
    scheduler = scheduler_config("scaled_linear", "epsilon", learned_variance=True)
    return Model(unet, model.vae, model.conditioner, scheduler, replace(model.defaults, steps=6))


def test_a_folder_is_read_by_diffusers_and_painted_from_step_for_step(learned_model: Model, tmp_path: Path):
    save_model(learned_model, tmp_path)
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["out_channels"] == 8
    assert (
        json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["variance_type"] == "learned_range"
    )
    pipe = TextToImagePipeline.from_pretrained(tmp_path, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    texts = learned_model.conditioner(["", "an oil painting of a fox"])["encoder_hidden_states"]
    seen, generator = [], torch.Generator().manual_seed(5)
    scheduler.set_timesteps(6)
    x = torch.randn(1, 4, 4, 4, generator=generator)
    for t in scheduler.timesteps:
        seen.append(x)
        with torch.no_grad():
            output = unet(torch.cat([x, x]), t, encoder_hidden_states=texts).sample
        (null, cond), variance = output[:, :4].chunk(2), output[1:, 4:]
        output = torch.cat([null + 3 * (cond - null), variance], dim=1)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    ours = []
    pipe(
        "an oil painting of a fox",
        generator=torch.Generator().manual_seed(5),
        guidance_scale=3.0,
        callback=lambda i, sigma, x, x0: ours.append(x / math.sqrt(1 + sigma**2)),
        output_type="latent",
    )
    assert len(ours) == 6
    for got, wanted in zip(ours, seen, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_what_has_no_layout_of_diffusers_is_refused_by_name(learned_model: Model, tmp_path: Path):
    assert "learns the variance" in for_atelier_alone(learned_model)
    with pytest.raises(ValueError, match="learns the variance"):
        TextToImagePipeline(learned_model).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    save_model(learned_model, tmp_path)
    assert not (tmp_path / "model_index.json").exists()
    # Every other sampler takes the mean and leaves the variance.
    pipe = TextToImagePipeline(load_model(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a fox", steps=2, sampler="heun", seed=0, output_type="latent").images.shape == (1, 4, 4, 4)


def test_what_does_not_fit_is_refused():
    model = tiny_model()
    for path in ("flow", "edm"):
        with pytest.raises(ValueError, match=f"learned variance.*{path}"):
            scheduler_config(path, "velocity" if path == "flow" else "edm", learned_variance=True)
    unet = UNet(replace(model.unet.config, out_channels=5))
    with pytest.raises(ValueError, match="puts out 5 channels for latents of 4: expected 4, or 8 with the variance"):
        Model(unet, model.vae, model.conditioner, model.scheduler, model.defaults)
    for schedule, prediction in ((RectifiedFlow(), "velocity"), (EDM(1.0), "edm")):
        with pytest.raises(ValueError, match=f"rows of a beta table; got {type(schedule).__name__}"):
            HybridLoss(Denoiser(nn.Identity(), schedule, prediction))
    denoiser, x = Denoiser(nn.Identity(), TABLE, "sample"), draw(2, 3, 4, 4)
    with denoiser.learned_variance() as variance:
        denoiser.network.forward = lambda sample, timestep: sample
        denoiser(x, 1.0)
        with pytest.raises(ValueError, match="6 output channels, two for each of x; this one has 3"):
            variance(x, 1.0)
    with pytest.raises(ValueError, match="--learned-variance"):
        Config(model="bundled", learned_variance=True)


@pytest.mark.parametrize("other", [{"huber": 0.1}, {"perturbation": 0.1}])
def test_what_its_loss_has_no_room_for_is_refused_in_fine_tuning_too(learned_model: Model, other: dict):
    with pytest.raises(ValueError, match="learned variance has a loss of its own: leave out --huber and --perturb"):
        denoising(learned_model, Config(model="its folder", **other), lambda captions: {})


@pytest.mark.usefixtures("in_process")
def test_one_setting_trains_it(picture_folder: Path, tmp_path: Path):
    config = Config(
        data=str(picture_folder),
        output=tmp_path / "run",
        cache=tmp_path / "cache",
        vae="none",
        text_encoder="none",
        unet=replace(SMALL, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=2),
        size=16,
        learned_variance=True,
        updates=3,
        batch_size=4,
        warmup=1,
        steps=2,
        workers=0,
    )
    run = main(config)
    model = load_model(run)
    assert model.learned_variance
    assert model.unet.config.out_channels == 6
    assert model.defaults.sampler == "ddpm"
    assert model.scheduler["_class_name"] == "DDPMScheduler"
    trained = torch.load(checkpoints(run)[-1] / "training" / "state.pt", weights_only=True)["weights"]
    moved = trained["unet.conv_out.weight"].flatten(1).abs().amax(1)
    assert bool((moved > 0).all())  # mean and variance
    pipe = TextToImagePipeline(model)
    pipe.set_progress_bar_config(disable=True)
    painted = {
        s: pipe("", steps=3, seed=1, sampler=s, output_type="latent").images for s in ("ddpm", "euler_ancestral")
    }
    assert not torch.allclose(painted["ddpm"], painted["euler_ancestral"], atol=1e-3)  # which is the small variance
    tuned = Config(model=str(run), output=tmp_path / "tuned", data=config.data, cache=config.cache, size=16, updates=1)
    again = main(replace(tuned, batch_size=4, steps=2, workers=0))
    assert load_model(again).learned_variance  # a fine-tuned one keeps its variance, and trains it
