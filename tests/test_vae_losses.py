"""The autoencoder's losses against their formulas, the discriminator against what it must be able to learn."""

import builtins
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from vae.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from vae.losses import (
    ROUNDING,
    LossWeights,
    PatchDiscriminator,
    adaptive_weight,
    adversarial_weight,
    autoencoder_loss,
    discriminator_loss,
    elbo_loss,
    generator_loss,
    gradient_loss,
    kl_loss,
    load_perceptual,
    local_detail,
    pixel_loss,
    squared_loss,
    texture_loss,
)


def some_pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 8, 12, generator=generator), torch.rand(2, 3, 8, 12, generator=generator)


def test_pixel_squared_and_gradient_terms_are_their_formulas():
    output, target = some_pictures()
    error = (output - target).double()
    for i in range(2):
        along_y = sum(abs(error[i, :, y + 1] - error[i, :, y]).sum().item() for y in range(7)) / (3 * 7 * 12)
        along_x = sum(abs(error[i, :, :, x + 1] - error[i, :, :, x]).sum().item() for x in range(11)) / (3 * 8 * 11)
        assert pixel_loss(output, target)[i].item() == pytest.approx(error[i].abs().mean().item(), abs=1e-6)
        assert gradient_loss(output, target)[i].item() == pytest.approx(along_y + along_x, abs=1e-6)
        assert squared_loss(output, target)[i].item() == pytest.approx((error[i] ** 2).mean().item(), abs=1e-6)


def test_each_term_sees_what_it_is_for():
    picture, _ = some_pictures()
    assert gradient_loss(picture + 0.5, picture).max() < 1e-6  # a wrong colour has no wrong edge
    checks = (torch.arange(8)[:, None] + torch.arange(12)) % 2 * 2.0 - 1
    assert gradient_loss(picture + checks, picture).min() > 3  # steps of 2 between all neighbours, along both axes
    psnr = -10 * (squared_loss(picture + 0.2, picture) / 4).log10()  # pictures span 2
    assert psnr.tolist() == pytest.approx([20.0, 20.0], abs=1e-4)


def test_texture_is_how_strong_detail_is_and_not_where():
    generator = torch.Generator().manual_seed(0)
    noise, other = 0.3 * torch.randn(2, 4, 3, 64, 64, generator=generator)
    grey = torch.full((4, 3, 64, 64), 0.2)
    # White noise of deviation s differs by sqrt(2) s from its neighbours, and by half of that averaged over 2×2.
    expected = 0.3 * (2**0.5 + 0.5**0.5) / 2 - 0.01
    assert texture_loss(grey, grey + noise).tolist() == pytest.approx([expected] * 4, rel=0.05)
    assert texture_loss(grey + other, grey + noise).max() < 0.2 * expected  # as much, in other places
    assert pixel_loss(grey + other, grey + noise).min() > 1.3 * pixel_loss(grey, grey + noise).max()


@pytest.mark.parametrize(("along", "differ"), [((1, 0), 0), ((0, 1), 1), ((1, 1), 2), ((-1, 1), 3)])
def test_texture_knows_four_directions(along, differ):
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    stripes = torch.sin(0.7 * (along[0] * y + along[1] * x)).expand(1, 1, 64, 64)
    rows, columns, diagonal, other = (float(detail.mean()) for detail in list(local_detail(stripes))[:4])
    strengths = [rows, columns, diagonal, other]
    assert max(range(4), key=strengths.__getitem__) == differ
    steps = (along[0], along[1], along[0] + along[1], along[1] - along[0])  # from a pixel to the neighbour, in phase
    expected = [2**0.5 * abs(math.sin(0.35 * step)) for step in steps]  # RMS of sin(a + step) - sin(a)
    assert strengths == pytest.approx(expected, abs=0.03)


def test_total_is_the_weighted_sum_of_the_terms():
    output, target = torch.rand(2, 2, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    posterior = Posterior(torch.full((2, 4, 1, 2), 0.5), torch.zeros(2, 4, 1, 2))
    weights = LossWeights(pixel=2.0, squared=3.0, gradient=0.5, kl=0.1, texture=0.7, perceptual=0.5)
    perceptual = lambda a, b: (a - b).square().flatten(1).mean(1)  # noqa: E731
    total, terms = autoencoder_loss(output, target, posterior, weights, perceptual)
    alone = {"gradient": gradient_loss(output, target), "texture": texture_loss(output, target)}
    assert terms.keys() == {"pixel", "squared", "kl", "perceptual", *alone}
    for name, values in alone.items():
        assert terms[name].tolist() == pytest.approx(values.tolist())
    assert all(term.shape == (2,) and not term.requires_grad for term in terms.values())
    given = {"pixel": 2, "squared": 3, "gradient": 0.5, "kl": 0.1, "texture": 0.7, "perceptual": 0.5}
    expected = sum(weight * terms[name] for name, weight in given.items())
    assert total.item() == pytest.approx(expected.mean().item(), rel=1e-6)
    assert kl_loss(posterior).tolist() == pytest.approx([0.125, 0.125])  # mean² / 2 nats for each value
    assert autoencoder_loss(output, target, posterior, LossWeights(0, 0, 0, 0))[0] == 0


def test_latents_of_half_the_resolution_are_tied_to_the_picture_of_half():
    output, target = some_pictures()
    weights = LossWeights(pixel=2.0, squared=3.0, gradient=0.5, kl=0.0, halved=0.25)
    small = target.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    posterior = Posterior(torch.zeros(2, 4, 1, 2), torch.zeros(2, 4, 1, 2))
    without = autoencoder_loss(output, target, posterior, weights)[0]
    exact, _ = autoencoder_loss(output, target, posterior, weights, halved=small)
    assert exact.item() == pytest.approx(without.item(), abs=1e-6)
    apart, terms = autoencoder_loss(output, target, posterior, weights, halved=small + 0.1)  # no edge is wrong
    assert terms["halved"].tolist() == pytest.approx([2 * 0.1 + 3 * 0.01] * 2, abs=1e-5)
    assert apart.item() == pytest.approx(without.item() + 0.25 * 0.23, abs=1e-5)


def test_the_bound_is_that_of_a_gaussian_decoder_of_the_best_variance():
    """Against torch.distributions; no other variance makes it smaller."""
    output, target = some_pictures()
    generator = torch.Generator().manual_seed(1)
    mean, logvar = (torch.randn(2, 4, 2, 3, generator=generator) for _ in range(2))
    divergence = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).flatten(1).sum(1) / target[0].numel()
    best = (output - target).square().mean().sqrt()

    def bound(std: torch.Tensor) -> torch.Tensor:
        return divergence - Normal(output, std).log_prob(target).flatten(1).mean(1)

    got = elbo_loss(output, target, Posterior(mean, logvar))
    torch.testing.assert_close(got, bound(best))
    assert got.mean() < min(bound(best * factor).mean() for factor in (0.9, 1.1))
    perfect = elbo_loss(target, target, Posterior(mean, logvar))  # rounding to 8 bits is left
    torch.testing.assert_close(perfect, divergence - Normal(0.0, ROUNDING**0.5).log_prob(torch.zeros(2)))
    total, terms = autoencoder_loss(output, target, Posterior(mean, logvar), LossWeights(0, 0, 0, 0, elbo=1))
    assert terms.keys() == {"elbo"}
    assert total == got.mean()


def test_kl_weight_of_latent_diffusion_in_our_units():
    """LDM adds w * KL to the sum over pixels; divided by the number of pixel values that is the docstring's weight."""
    posterior = Posterior(torch.randn(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    pixels = 3 * 16 * 16
    ours = 1e-6 * 4 / (3 * 8**2) * kl_loss(posterior)
    assert ours.item() == pytest.approx(1e-6 * posterior.kl().item() / pixels, rel=1e-5)


def test_wrong_weights_and_a_missing_perceptual_loss_are_refused():
    output, target = some_pictures()
    posterior = Posterior(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))
    with pytest.raises(ValueError, match="load_perceptual"):
        autoencoder_loss(output, target, posterior, LossWeights(perceptual=1.0))
    for value in (-1.0, math.nan):
        with pytest.raises(ValueError, match="kl"):
            LossWeights(kl=value)


def test_perceptual_loss_says_what_to_do_where_it_cannot_be_had(monkeypatch):
    real_import = builtins.__import__

    def without_lpips(name, *args, **kwargs):
        if name == "lpips":
            raise ImportError("No module named 'lpips'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_lpips)
    with pytest.raises(ValueError, match=r"pip install 'atelier-diffusion\[lpips\]'"):
        load_perceptual()
    with pytest.raises(ValueError, match="squeeze"):
        load_perceptual("resnet")


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert generator_loss(fake).item() == pytest.approx(2 / 3)


def test_adaptive_weight_by_hand():
    last = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    x = torch.tensor([1.0, -2.0])
    reconstruction, adversarial = (last @ x).sum() * 6, (last @ x).square().sum() / 2
    # gradients: 6 on every row times x, norm 6 * sqrt(2) * |x|; (W x) x^T, norm |W x| * |x|
    expected = 6 * math.sqrt(2) * math.sqrt(5) / (math.sqrt(9 + 25) * math.sqrt(5) + 1e-4)
    weight = adaptive_weight(reconstruction, adversarial, last)
    assert weight.item() == pytest.approx(expected, rel=1e-6)
    assert not weight.requires_grad
    assert last.grad is None
    assert adaptive_weight(reconstruction, adversarial * 1e-9, last, maximum=50.0).item() == 50.0
    (reconstruction + weight * adversarial).backward()  # the graph is still there


def test_processes_together_weigh_as_one_alone():
    """What the whole batch decides (the adaptive weight, the bound's variance) is the same of its halves."""
    torch.manual_seed(0)
    last = nn.Parameter(torch.randn(3, 5))
    x, y = torch.randn(8, 5), torch.randn(8, 3)

    def losses(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        out = x[rows] @ last.T
        return (out - y[rows]).square().mean(), out.sin().mean()

    whole = adaptive_weight(*losses(slice(0, 8)), last)
    parts: list[torch.Tensor] = []  # gradients of the first half, then of the second
    for half in (slice(0, 4), slice(4, 8)):
        adaptive_weight(*losses(half), last, mean=lambda g: parts.append(g) or g)  # type: ignore[func-returns-value]
    others = iter((parts[2], parts[3]))
    shared = adaptive_weight(*losses(slice(0, 4)), last, mean=lambda g: (g + next(others)) / 2)
    torch.testing.assert_close(shared, whole)
    scaled = adaptive_weight(*losses(slice(0, 8)), last, scale=1024.0)
    torch.testing.assert_close(scaled, whole)

    output, target = torch.rand(4, 3, 8, 8, requires_grad=True), torch.rand(4, 3, 8, 8)
    posterior = Posterior(torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4))
    (alone,) = torch.autograd.grad(elbo_loss(output, target, posterior).mean(), output)
    variance = (output.detach() - target).square().mean()
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        part = Posterior(posterior.mean[half], posterior.logvar[half])
        halves.append(elbo_loss(output[half], target[half], part, lambda _: variance).mean())
    (together,) = torch.autograd.grad(sum(halves) / 2, output)
    torch.testing.assert_close(together, alone)
    error = (output - target).square().flatten(1).mean(1)  # with the variance as a function of the pictures
    (free,) = torch.autograd.grad((error / error.mean() + error.mean().log()).mean() / 2, output)
    torch.testing.assert_close(alone, free)


def test_adaptive_weight_makes_both_pull_equally_at_the_decoder():
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(block_out_channels=(8, 8), norm_num_groups=4))
    critic = PatchDiscriminator(width=8, layers=1)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output, posterior, _ = model(images)
    loss, _ = autoencoder_loss(output, images, posterior, LossWeights())
    adversarial = generator_loss(critic(output))
    weight = adaptive_weight(loss, adversarial, model.last_layer, eps=0.0)
    norms = [
        torch.autograd.grad(x, model.last_layer, retain_graph=True)[0].norm() for x in (loss, weight * adversarial)
    ]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-5)


def test_adversarial_term_starts_late():
    weights = LossWeights(adversarial=0.5, adversarial_start=100)
    assert [adversarial_weight(weights, step) for step in (0, 99, 100, 5000)] == [0.0, 0.0, 0.5, 0.5]
    assert adversarial_weight(LossWeights(), 10**6) == 0.0


@pytest.mark.parametrize("norm", ["group", "spectral"])
def test_discriminator_learns_to_tell_noise_from_stripes(norm):
    torch.manual_seed(0)
    critic = PatchDiscriminator(width=8, layers=2, norm=norm)
    stripes = (torch.arange(32) // 4 % 2 * 2.0 - 1).expand(4, 3, 32, 32)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    for _ in range(60):
        loss = discriminator_loss(critic(stripes + 0.1 * torch.randn_like(stripes)), critic(torch.randn(4, 3, 32, 32)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    critic.eval()
    assert critic(stripes).mean() - critic(torch.randn(4, 3, 32, 32)).mean() > 1


@pytest.mark.parametrize(("layers", "patch"), [(2, 34), (3, 70)])
def test_a_logit_sees_its_patch_only(layers, patch):
    torch.manual_seed(0)
    critic = PatchDiscriminator(width=4, layers=layers, norm="spectral").eval()
    images = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = critic(images)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
    seen = gradient.abs().sum((0, 1)).sum(0).nonzero().flatten()
    assert (seen.max() - seen.min() + 1).item() == patch


def test_spectral_norm_bounds_every_layer():
    critic = PatchDiscriminator(width=8, layers=2, norm="spectral")
    for _ in range(50):
        critic(torch.randn(1, 3, 32, 32))
    for module in critic.modules():
        if isinstance(module, nn.Conv2d):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1.0, abs=0.05)


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="batch"):
        PatchDiscriminator(norm="batch")
