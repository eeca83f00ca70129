"""Every sampler with every prediction on every schedule, guided and not, in the shapes of pixels and of latents.

The data are pictures whose pixels are independent N(mean, STD²). Their denoiser is known, and so is a network for each
prediction; with the mean as condition, guidance gives exactly the denoiser of another mean.
"""

import pytest
import torch
from torch import nn

from ldm.denoiser import PREDICTIONS, Denoiser
from ldm.guidance import classifier_free
from ldm.samplers import SAMPLERS, Churn, picture_noise
from ldm.schedule import EDM, RectifiedFlow, VariancePreserving, step_grid

VP = VariancePreserving.scaled_linear()
SCHEDULES = {
    "linear": VariancePreserving.linear(),
    "scaled_linear": VP,
    "cosine": VariancePreserving.cosine(),
    "zero_terminal": VP.zero_terminal_snr(),
    "flow": RectifiedFlow(),
    "edm": EDM(1.0),
    "edm_half": EDM(0.5),
}
SHAPES = {"pixels": (3, 24, 24), "latents": (4, 16, 20)}
STEPS, STD = 20, 0.5
CONDITION, NULL, SCALE = 0.4, 0.1, 2.0
# How far the standard deviation may be off, of itself, after 20 steps, chance included.
TOLERANCE = {
    "ddpm": 0.3, "euler_ancestral": 0.3, "ddim": 0.2, "euler": 0.18, "heun": 0.12, "stochastic_heun": 0.3,
    "dpmpp_2m": 0.12, "dpmpp_2m_sde": 0.15, "unipc": 0.12, "lms": 0.08, "plms": 0.08, "langevin": 0.25,
    "predictor_corrector": 0.12,
}  # fmt: skip
OPTIONS = {
    "ddim": {"eta": 0.5},
    "heun": {"churn": Churn(3.0, 0.05, 10.0)},
    "langevin": {"step_size": 0.8, "updates": 6},
    "predictor_corrector": {"ancestral": True},
}


class Gaussian(nn.Module):
    """The network whose denoiser is that of N(class_labels, STD²)."""

    def __init__(self, schedule, prediction):
        super().__init__()
        self.schedule, self.prediction = schedule, prediction

    def forward(self, sample, timestep, class_labels):
        sigma = self.schedule.sigma(timestep)
        alpha = self.schedule.alpha(sigma)
        d = getattr(self.schedule, "sigma_data", 1.0)
        c_skip, c_out = PREDICTIONS[self.prediction](self.schedule, sigma, d)
        share = STD**2 / (STD**2 + sigma**2)
        # (mean + share * (x - mean) - c_skip * x) / c_out, where x = sample / alpha
        of_sample, rest = (share - c_skip) / (alpha * c_out), (1 - share) * class_labels / c_out
        return of_sample.view(-1, 1, 1, 1) * sample + rest.view(-1, 1, 1, 1)


def fits(schedule, prediction):
    try:
        Denoiser(nn.Identity(), schedule, prediction, getattr(schedule, "sigma_data", 1.0))
    except ValueError:
        return False
    return True


FITTING = [(name, p) for name, schedule in SCHEDULES.items() for p in PREDICTIONS if fits(schedule, p)]


def test_no_combination_is_left_out():
    assert set(TOLERANCE) == set(SAMPLERS)
    assert len(FITTING) == 27
    assert {name for name, _ in FITTING} == set(SCHEDULES)
    assert {prediction for _, prediction in FITTING} == set(PREDICTIONS)


@torch.no_grad()
def paint(name, schedule, prediction, shape, guided, seeds):
    denoiser = Denoiser(Gaussian(schedule, prediction), schedule, prediction, getattr(schedule, "sigma_data", 1.0))
    means = [{"class_labels": torch.full((len(seeds),), mean)} for mean in (CONDITION, NULL)]
    denoise = classifier_free(denoiser, *means, SCALE if guided else 1.0)
    sampler, noise = SAMPLERS[name], picture_noise([torch.Generator().manual_seed(seed) for seed in seeds])
    spaced = sampler.grid_for(schedule)
    sigmas = step_grid(schedule, STEPS, spaced)
    x = noise(torch.empty(len(seeds), *shape)) * sampler.initial_scale(spaced, sigmas[0])
    return sampler.function(denoise, x, sigmas, noise=noise, **OPTIONS.get(name, {}))


@pytest.mark.parametrize(("schedule", "prediction"), FITTING)
@pytest.mark.parametrize("name", SAMPLERS)
def test_matrix(name, schedule, prediction):
    for shape in SHAPES.values():
        for guided, mean in ((False, CONDITION), (True, NULL + SCALE * (CONDITION - NULL))):
            together = paint(name, SCHEDULES[schedule], prediction, shape, guided, [5, 6])
            assert together.shape == (2, *shape)
            assert together.dtype == torch.float32
            assert bool(together.isfinite().all())
            # Painted again and alone, the second picture is the same.
            alone = paint(name, SCHEDULES[schedule], prediction, shape, guided, [6])
            torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)
            assert float((together[0] - together[1]).abs().mean()) > 0.1
            assert float(together.mean()) == pytest.approx(mean, abs=0.05)  # chance alone: 0.01
            assert float(together.std()) == pytest.approx(STD, rel=TOLERANCE[name])
