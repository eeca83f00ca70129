"""Samplers step for step against diffusers' schedulers."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import nn

from ldm.denoiser import Denoiser
from ldm.samplers import SAMPLERS, ddpm, picture_noise
from ldm.schedule import RectifiedFlow, step_grid
from tests.sampling import LATENTS, LEADING, NAMES, SD, VP, Network, close, draw, generators, ours, theirs, unscaled

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_that_of_diffusers(prediction, variance):
    config = SD | {"prediction_type": NAMES[prediction], "variance_type": f"fixed_{variance}", "clip_sample": False}
    scheduler = DDPMScheduler(**config)
    expected = theirs(scheduler, 25, LATENTS, generator=generators(1, 2))
    got, sigmas = ours("ddpm", prediction, 25, LATENTS, variance=variance, noise=picture_noise(generators(1, 2)))
    close(unscaled(got, sigmas), expected)


class Learned(nn.Module):
    """A network that also puts out the variance; what it said last is kept beside what it predicts."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread, self.runs = Network(), nn.Conv2d(3, 3, 1), 0
        nn.init.constant_(self.spread.bias, 0.3)
        nn.init.eye_(self.spread.weight[:, :, 0, 0])

    def both(self, sample, timestep):
        return torch.cat([self.mean(sample, timestep), torch.tanh(self.spread(sample))], 1)  # [B, 6, H, W]

    def forward(self, sample, timestep):
        self.runs += 1
        output, self.said = self.both(sample, timestep).chunk(2, 1)
        return output


@pytest.mark.parametrize("prediction", NAMES)
def test_the_learned_variance_is_that_of_diffusers(prediction):
    """Theirs is learned_range: the network's second half, from -1 to 1, is where between the logs the variance lies."""
    config = SD | {"prediction_type": NAMES[prediction], "variance_type": "learned_range", "clip_sample": False}
    scheduler, network, x_t, expected, got = DDPMScheduler(**config), Learned(), LATENTS, [], []
    scheduler.set_timesteps(25)
    drawers = generators(1, 2)
    sigmas = step_grid(VP, 25, SAMPLERS["ddpm"].grid_for(VP))
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected.append(x_t)
            x_t = scheduler.step(network.both(x_t, t), t, x_t, generator=drawers).prev_sample
        last = ddpm(
            Denoiser(network, VP, prediction),
            LATENTS / float(VP.alpha(sigmas[0])),
            sigmas,
            variance=lambda x, sigma: (network.said + 1) / 2,
            noise=picture_noise(generators(1, 2)),
            callback=lambda i, sigma, x, x0: got.append(x),
        )
    close(unscaled([*got, last], sigmas), [*expected, x_t])
    assert network.runs == 25
    assert float(network.said.std()) > 0.1


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_is_that_of_diffusers(prediction, eta, to_one):
    scheduler = DDIMScheduler(
        **SD, prediction_type=NAMES[prediction], clip_sample=False, set_alpha_to_one=to_one, steps_offset=1
    )
    expected = theirs(scheduler, 20, LATENTS, eta=eta, generator=generators(3, 4))
    options = LEADING | {"final": "zero" if to_one else "sigma_min"}
    got, sigmas = ours(
        "ddim", prediction, 20, LATENTS, grid_options=options, eta=eta, noise=picture_noise(generators(3, 4))
    )
    close(unscaled(got, sigmas), expected)


def test_ddim_with_given_variance_noise():
    scheduler = DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(10)
    network, x_t = Network(), LATENTS
    noises = [draw(2, 3, 6, 6, seed=20 + i, dtype=torch.float32) for i in range(10)]
    with torch.no_grad():
        for t, noise in zip(scheduler.timesteps, noises, strict=True):
            x_t = scheduler.step(network(x_t, t), t, x_t, eta=0.7, variance_noise=noise).prev_sample
    stream = iter(noises)
    got, _ = ours("ddim", "epsilon", 10, LATENTS, eta=0.7, noise=lambda x: next(stream))
    close([got[-1]], [x_t])


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("options", [{}, LEADING, {"spacing": "trailing"}], ids=["linspace", "leading", "trailing"])
def test_euler_is_that_of_diffusers(prediction, options):
    config = {"timestep_spacing": options.get("spacing", "linspace"), "steps_offset": options.get("offset", 0)}
    scheduler = EulerDiscreteScheduler(**SD, prediction_type=NAMES[prediction], **config)
    expected = theirs(scheduler, 28, LATENTS)  # 28 points of linspace are whole rows: 999 / 27 = 37
    got, _ = ours("euler", prediction, 28, LATENTS, grid_options=options)
    close(got, expected)


def test_euler_between_rows_is_that_of_diffusers_but_for_the_clock():
    """Between rows their sigma is linear and ours log-linear in the row: at equal sigma the clocks differ by < 0.01."""
    got, sigmas = ours("euler", "epsilon", 20, LATENTS)
    scheduler = EulerDiscreteScheduler(**SD)
    close(got, theirs(scheduler, 20, LATENTS), 1e-3)
    torch.testing.assert_close(VP.timestep(sigmas[:-1]).float(), scheduler.timesteps, rtol=0, atol=0.01)
    close(got, theirs(EulerDiscreteScheduler(**SD), 20, LATENTS, clock=VP.timestep(sigmas[:-1]).float()))


@pytest.mark.parametrize("prediction", NAMES)
def test_euler_ancestral_is_that_of_diffusers(prediction):
    scheduler = EulerAncestralDiscreteScheduler(**SD, prediction_type=NAMES[prediction])
    expected = theirs(scheduler, 28, LATENTS, generator=generators(8, 9))
    got, _ = ours("euler_ancestral", prediction, 28, LATENTS, noise=picture_noise(generators(8, 9)))
    close(got, expected)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("options", [{}, LEADING, {"ramp": "karras"}], ids=["linspace", "leading", "karras"])
def test_heun_is_that_of_diffusers(prediction, options):
    config = {"timestep_spacing": options.get("spacing", "linspace"), "steps_offset": options.get("offset", 0)}
    scheduler = HeunDiscreteScheduler(
        **SD, prediction_type=NAMES[prediction], use_karras_sigmas="ramp" in options, **config
    )
    expected = theirs(scheduler, 10, LATENTS)
    got, _ = ours("heun", prediction, 10, LATENTS, grid_options=options)
    close(got, [*expected[:-1:2], expected[-1]])  # theirs counts the second evaluation as a step


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [3, 14, 20])
@pytest.mark.parametrize(
    "options",
    [{}, LEADING, {"spacing": "trailing"}, {"final": "sigma_min"}, {"ramp": "karras"},
     {"ramp": "karras", "final": "sigma_min"}],
    ids=["linspace", "leading", "trailing", "sigma_min", "karras", "karras_sigma_min"],
)  # fmt: skip
def test_dpmpp_2m_is_that_of_diffusers(prediction, steps, options):
    if options == {"ramp": "karras", "final": "sigma_min"} and steps >= 15:
        steps = 14  # theirs ends in a step of no length, where its second order divides by 0
    scheduler = DPMSolverMultistepScheduler(
        **SD,
        prediction_type=NAMES[prediction],
        timestep_spacing=options.get("spacing", "linspace"),
        steps_offset=options.get("offset", 0),
        final_sigmas_type=options.get("final", "zero"),
        use_karras_sigmas="ramp" in options,
    )
    got, sigmas = ours("dpmpp_2m", prediction, steps, LATENTS, grid_options=options)
    # With Karras theirs rounds the clock to whole rows; the network is asked at ours.
    clock = VP.timestep(sigmas[:-1]).float() if "ramp" in options else None
    expected = theirs(scheduler, steps, LATENTS, clock=clock)
    close(unscaled(got, sigmas), expected)
    torch.testing.assert_close(VP.timestep(sigmas[:-1]).float(), scheduler.timesteps.float(), rtol=0, atol=0.501)


def test_flow_euler_is_that_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.init_noise_sigma = 1.0
    scheduler.scale_model_input = lambda x, t: x
    scheduler.set_timesteps(12)
    expected = theirs(scheduler, 12, LATENTS, clock=scheduler.timesteps / 1000)
    got, sigmas = ours("euler", "velocity", 12, LATENTS, schedule=RectifiedFlow())
    close(unscaled(got, sigmas, RectifiedFlow()), expected, 1e-3)  # theirs starts at t = 1, ours at 0.99976


def test_ddim_at_zero_terminal_snr_is_that_of_diffusers():
    config = SD | {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = DDIMScheduler(**config, clip_sample=False)
    schedule = VP.zero_terminal_snr()
    got, sigmas = ours("ddim", "v", 20, LATENTS, schedule=schedule)
    close(unscaled(got, sigmas, schedule), theirs(scheduler, 20, LATENTS), 1e-3)


def test_noise_is_that_of_diffusers_for_a_list_of_generators():
    from diffusers.utils.torch_utils import randn_tensor

    got = picture_noise(generators(1, 2))(torch.empty(2, 3, 5, 5))
    assert torch.equal(got, randn_tensor((2, 3, 5, 5), generator=generators(1, 2)))
    one = picture_noise(generators(2))(torch.empty(1, 3, 5, 5))
    assert torch.equal(one[0], got[1])
    assert picture_noise(generators(1))(torch.empty(1, 2, 2, 2, dtype=torch.float64)).dtype == torch.float64


def test_latents_start_where_diffusers_starts_them():
    for scheduler, name, options in (
        (EulerDiscreteScheduler(**SD), "euler", {}),
        (EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1), "euler", LEADING),
        (EulerDiscreteScheduler(**SD, use_karras_sigmas=True), "euler", {"ramp": "karras"}),
        (HeunDiscreteScheduler(**SD, timestep_spacing="trailing"), "heun", {"spacing": "trailing"}),
    ):
        scheduler.set_timesteps(15)
        chosen = SAMPLERS[name].grid_for(VP, **options)
        sigma = float(step_grid(VP, 15, chosen)[0])
        assert SAMPLERS[name].initial_scale(chosen, sigma) == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    chosen = SAMPLERS["ddim"].grid_for(VP)
    assert SAMPLERS["ddim"].initial_scale(chosen, 13.0) * float(VP.alpha(13.0)) == pytest.approx(1)
