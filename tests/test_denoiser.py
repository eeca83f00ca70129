"""The one equation: each prediction against its paper's definition, conversions as inverses, and what is refused."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from ldm.denoiser import (
    PREDICTIONS,
    Denoiser,
    epsilon_from,
    sample_from_epsilon,
    sample_from_score,
    sample_from_v,
    sample_from_velocity,
    score_from,
    v_from,
    velocity_from,
)
from ldm.schedule import EDM, RectifiedFlow, VariancePreserving

VP, FLOW, UNIT, HALF = VariancePreserving.scaled_linear(), RectifiedFlow(), EDM(1.0), EDM(0.5)
ZERO = VP.zero_terminal_snr()
FITTING = [
    (VP, "sample", 1.0), (VP, "epsilon", 1.0), (VP, "v", 1.0), (VP, "edm", 1.0),
    (ZERO, "sample", 1.0), (ZERO, "v", 1.0), (ZERO, "edm", 1.0),
    (FLOW, "sample", 1.0), (FLOW, "velocity", 1.0),
    (UNIT, "sample", 1.0), (UNIT, "epsilon", 1.0), (UNIT, "v", 1.0), (UNIT, "edm", 1.0),
    (HALF, "sample", 0.5), (HALF, "epsilon", 0.5), (HALF, "edm", 0.5),
]  # fmt: skip


class Recorder(nn.Module):
    """A network that keeps what it was given and returns a fixed function of it."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def forward(self, sample, timestep, encoder_hidden_states=None):
        self.seen = sample, timestep, encoder_hidden_states
        return torch.sin(3 * sample) * self.weight


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("schedule", "prediction", "d"), FITTING)
def test_the_target_is_what_turns_into_x0_and_back(schedule, prediction, d):
    denoiser = Denoiser(Recorder(), schedule, prediction, d)
    sigma = torch.tensor([schedule.sigma_min, 0.3, 1.0, 7.0, min(schedule.sigma_max, 14.0)], dtype=torch.float64)
    x0, noise = draw(5, 2, 3, 3), draw(5, 2, 3, 3, seed=1)
    x = x0 + sigma.view(5, 1, 1, 1) * noise
    target = denoiser.network_target(x0, noise, sigma)
    torch.testing.assert_close(denoiser.to_sample(x, target, sigma), x0, rtol=1e-9, atol=1e-9)
    output = draw(5, 2, 3, 3, seed=2)
    back = denoiser.to_output(x, denoiser.to_sample(x, output, sigma), sigma)
    torch.testing.assert_close(back, output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("schedule", "prediction", "d"), [one for one in FITTING if one[1] != "sample"])
def test_what_has_no_noise_stays_as_it_is(schedule, prediction, d):
    class Clocked(Recorder):  # as real networks, it answers to the time, too
        def forward(self, sample, timestep):
            return super().forward(sample, timestep) + torch.cos(timestep).view(-1, 1, 1, 1)

    x = draw(2, 2, 3, 3)
    torch.testing.assert_close(Denoiser(Clocked(), schedule, prediction, d)(x, 0.0), x)


def test_targets_are_the_papers_definitions():
    x0, noise = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    sigma = torch.tensor([0.05, 0.6, 2.0, 12.0], dtype=torch.float64)
    s = sigma.view(4, 1, 1, 1)

    def target(schedule, prediction, d=1.0):
        return Denoiser(Recorder(), schedule, prediction, d).network_target(x0, noise, sigma)

    close = {"rtol": 1e-9, "atol": 1e-9}
    alpha = (1 + s**2) ** -0.5
    torch.testing.assert_close(target(VP, "sample"), x0, **close)
    torch.testing.assert_close(target(VP, "epsilon"), noise, **close)
    torch.testing.assert_close(target(VP, "v"), alpha * noise - alpha * s * x0, **close)
    torch.testing.assert_close(target(FLOW, "velocity"), noise - x0, **close)
    # EDM's table 1, with d = 0.5: F = (x_0 - c_skip x) / c_out.
    d = 0.5
    c_skip, c_out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2) ** 0.5
    torch.testing.assert_close(target(HALF, "edm", d), (x0 - c_skip * (x0 + s * noise)) / c_out, **close)


def test_edm_with_unit_data_is_minus_v():
    x, output, sigma = draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1), torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    for schedule in (VP, UNIT):
        edm, v = (Denoiser(Recorder(), schedule, name) for name in ("edm", "v"))
        torch.testing.assert_close(edm.to_sample(x, -output, sigma), v.to_sample(x, output, sigma))


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (epsilon_from, sample_from_epsilon),
        (score_from, sample_from_score),
        (v_from, sample_from_v),
        (velocity_from, sample_from_velocity),
    ],
)
def test_conversions_are_inverses(there, back):
    x, x0 = draw(6, 1, 2, 2), draw(6, 1, 2, 2, seed=1)
    sigma = torch.tensor([0.002, 0.03, 0.5, 1.0, 14.6, 80.0], dtype=torch.float64)
    torch.testing.assert_close(back(x, there(x, x0, sigma), sigma), x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(there(x, back(x, x, sigma), sigma), x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back(x, there(x, x0, 0.5), 0.5), x0)  # one number for all


def test_conversions_agree_with_the_predictions_of_their_names():
    x, x0, sigma = draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1), torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    for schedule, name, convert in (
        (VP, "epsilon", epsilon_from), (VP, "v", v_from), (FLOW, "velocity", velocity_from),
    ):  # fmt: skip
        denoiser = Denoiser(Recorder(), schedule, name)
        torch.testing.assert_close(denoiser.to_output(x, x0, sigma), convert(x, x0, sigma))


def test_the_score_is_the_gradient_of_the_log_density():
    """Tweedie: for N(m, s²) data, D is known and the density of x is N(m, s² + sigma²)."""
    m, s, sigma = 0.3, 0.8, 1.7
    x = draw(50, 1, 1, 1).requires_grad_()
    log_density = torch.distributions.Normal(m, (s**2 + sigma**2) ** 0.5).log_prob(x)
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    estimate = m + s**2 / (s**2 + sigma**2) * (x - m)
    torch.testing.assert_close(score_from(x, estimate, sigma), gradient)


@pytest.mark.parametrize(
    ("prediction", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction"), ("sample", "sample")]
)
def test_the_estimate_is_that_of_diffusers(prediction, theirs):
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=theirs, clip_sample=False
    )
    network = Recorder()
    denoiser = Denoiser(network, VP, prediction)
    for t in (0, 1, 250, 999):
        x_t = draw(2, 4, 5, 5, seed=t, dtype=torch.float32)
        sigma = VP.table[t].float()
        ours = denoiser(x_t / VP.alpha(sigma), sigma)
        seen, timestep, _ = network.seen
        torch.testing.assert_close(seen, x_t, rtol=1e-6, atol=1e-6)
        assert timestep.tolist() == [t, t]
        expected = scheduler.step(network(x_t, None), t, x_t).pred_original_sample
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_network_sees_scaled_input_its_clock_and_the_context():
    for schedule, prediction, clock in ((VP, "v", 300.0), (FLOW, "velocity", 0.3), (UNIT, "edm", -0.2)):
        network = Recorder()
        sigma = schedule.sigma(clock)
        words = draw(2, 7, 3)
        x = draw(2, 1, 4, 4, dtype=torch.float32)
        out = Denoiser(network, schedule, prediction)(x, sigma, {"encoder_hidden_states": words})
        sample, timestep, context = network.seen
        torch.testing.assert_close(sample, schedule.alpha(sigma) * x)
        torch.testing.assert_close(timestep, torch.full((2,), clock))
        assert context is words
        assert out.shape == x.shape


def test_one_level_for_all_and_one_for_each_agree():
    denoiser = Denoiser(Recorder(), VP, "v")
    x = draw(3, 1, 4, 4, dtype=torch.float32)
    one = denoiser(x, 2.5)
    for sigma in (torch.tensor(2.5), torch.tensor([2.5]), torch.full((3,), 2.5), torch.full((3,), 2.5).double()):
        torch.testing.assert_close(denoiser(x, sigma), one)
    mixed = denoiser(x, torch.tensor([2.5, 0.1, 2.5]))
    torch.testing.assert_close(mixed[::2], one[::2])
    assert not torch.allclose(mixed[1], one[1])


def test_half_precision_networks_leave_the_rest_in_float32():
    network = Recorder(torch.bfloat16)
    x = draw(2, 1, 4, 4, dtype=torch.float32) * 5
    out = Denoiser(network, VP, "v")(x, 3.0)
    sample, timestep, _ = network.seen
    assert sample.dtype == torch.bfloat16
    assert timestep.dtype == torch.float32
    assert out.dtype == torch.float32
    # The input's share in x_0 is not rounded to bfloat16: only the network's output is.
    rest = out - x / 10
    torch.testing.assert_close(rest, -3 / 10**0.5 * network(sample, None).float(), rtol=1e-5, atol=1e-6)
    assert Denoiser(Recorder(torch.float64), VP, "v")(x.double(), 3.0).dtype == torch.float64
    assert Denoiser(network, VP, "v")(x.bfloat16(), 3.0).dtype == torch.float32


def test_gradients_reach_the_network():
    network = Recorder()
    Denoiser(network, VP, "epsilon")(draw(2, 1, 4, 4, dtype=torch.float32), 1.0).sum().backward()
    assert network.weight.grad.abs() > 0


def test_combinations_that_have_no_meaning_are_refused_by_name():
    every = [(s, p, getattr(s, "sigma_data", 1.0)) for s in (VP, ZERO, FLOW, UNIT, HALF) for p in PREDICTIONS]
    for schedule, prediction, d in every:
        if (schedule, prediction, d) in [*FITTING, (VP, "mean", 1.0)]:
            Denoiser(Recorder(), schedule, prediction, d)
        else:
            with pytest.raises(ValueError, match=type(schedule).__name__):
                Denoiser(Recorder(), schedule, prediction, d)
    with pytest.raises(ValueError, match=r"one of sample, epsilon, v, velocity, edm, mean; got 'v_prediction'"):
        Denoiser(Recorder(), VP, "v_prediction")
    with pytest.raises(ValueError, match="give both the same"):
        Denoiser(Recorder(), HALF, "edm")
    with pytest.raises(ValueError, match="give both the same"):
        Denoiser(Recorder(), VP, "edm", 0.5)
    with pytest.raises(ValueError, match=r"one number or \[2\]"):
        Denoiser(Recorder(), VP, "v")(draw(2, 1, 4, 4), torch.ones(3))
