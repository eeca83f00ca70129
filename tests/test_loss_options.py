"""Losses beside the plain square: Huber's, perturbed inputs, debiased weights; against their papers' own terms."""

import pytest
import torch
from torch import Tensor, nn

from ldm.denoiser import Denoiser
from ldm.loss import Debiased, denoising_loss, training_noise, training_weight
from ldm.schedule import RectifiedFlow, VariancePreserving

VP = VariancePreserving.scaled_linear()
KINDS = [(VP, "epsilon"), (VP, "v"), (VP, "sample"), (RectifiedFlow(), "velocity")]


class Fixed(nn.Module):
    """Puts out what it is given."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output, self.seen = output, torch.zeros(0)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.seen = x
        return self.output


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(6, 3, 4, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    return x0, noise, output, torch.tensor([0.05, 0.3, 0.8, 1.0, 3.0, 12.0], dtype=torch.float64)


@pytest.mark.parametrize(("schedule", "prediction"), KINDS, ids=[kind for _, kind in KINDS])
def test_huber_is_that_of_the_networks_own_error(schedule, prediction: str) -> None:
    x0, noise, output, sigma = drawn()
    denoiser = Denoiser(Fixed(output), schedule, prediction)
    weight = training_weight("plain", denoiser, training_noise("uniform", schedule))
    error = output - denoiser.network_target(x0, noise, sigma)
    for c in (0.1, 2.0):
        loss = denoising_loss(denoiser, x0, None, sigma, noise, weight, huber=c)
        wanted = (2 * c * ((error**2 + c**2).sqrt() - c)).mean((1, 2, 3))
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-8)
    square = denoising_loss(denoiser, x0, None, sigma, noise, weight)
    torch.testing.assert_close(square, error.square().mean((1, 2, 3)), rtol=1e-6, atol=1e-8)
    far = denoising_loss(denoiser, x0, None, sigma, noise, weight, huber=1e4)
    torch.testing.assert_close(far, square, rtol=1e-5, atol=1e-7)  # as c grows it becomes the square
    x0, noise, sigma = x0.float(), noise.float(), sigma.float()
    denoiser = Denoiser(Fixed(output.float()), schedule, prediction)
    far = denoising_loss(denoiser, x0, None, sigma, noise, weight, huber=1e4)
    torch.testing.assert_close(far, square.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("schedule", "prediction"), KINDS, ids=[kind for _, kind in KINDS])
def test_a_perturbed_input_keeps_its_target(schedule, prediction: str) -> None:
    """Algorithm 1 of arXiv:2301.11706 in its own terms: x_t from more noise, the target from the noise alone."""
    x0, noise, output, sigma = drawn()
    seen = noise + 0.1 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(1), dtype=noise.dtype)
    network = Fixed(output)
    denoiser = Denoiser(network, schedule, prediction)
    weight = training_weight("plain", denoiser, training_noise("uniform", schedule))
    loss = denoising_loss(denoiser, x0, None, sigma, noise, weight, seen=seen)
    level = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(network.seen, schedule.alpha(level) * (x0 + level * seen))
    wanted = (output - denoiser.network_target(x0, noise, sigma)).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-8)
    plain = denoising_loss(denoiser, x0, None, sigma, noise, weight)
    same = denoising_loss(denoiser, x0, None, sigma, noise, weight, seen=noise)
    torch.testing.assert_close(same, plain, rtol=1e-6, atol=1e-8)


def test_debiased_is_epsilons_error_over_the_root_of_the_snr() -> None:
    x0, noise, output, sigma = drawn()
    denoiser = Denoiser(Fixed(output), VP, "epsilon")
    weight = training_weight("debiased", denoiser, training_noise("uniform", VP))
    assert weight == Debiased()
    loss = denoising_loss(denoiser, x0, None, sigma, noise, weight)
    snr = sigma**-2  # alpha² / (1 - alpha²)
    torch.testing.assert_close(loss, (output - noise).square().mean((1, 2, 3)) / snr.sqrt(), rtol=1e-6, atol=1e-8)
    assert float(Debiased()(torch.tensor(1e-4))) == pytest.approx(1000**0.5)
