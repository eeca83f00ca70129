"""The noisy classifier against the exact posterior of Gaussian classes, and what its guidance does in a pipeline."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from conditioning.context import Unconditional
from conditioning.labels import Labels
from ldm.classifier import NoisyClassifier, NoisyClassifierConfig, classification_loss
from ldm.guidance import classifier_free, classifier_guided
from ldm.loss import training_noise
from ldm.pixel_unet import PixelUNet, PixelUNetConfig
from ldm.unet import UNet
from pipelines import TextToImagePipeline
from pipelines.classifier import load_classifier
from pipelines.defaults import Defaults
from pipelines.files import save_network
from pipelines.folder import Model, scheduler_config
from tests.conftest import tiny_model
from train.build import begin_at_zero, without_text
from vae.autoencoder import Identity

NAMES = ("down", "up", "flat")
CONFIG = NoisyClassifierConfig(
    labels=NAMES, sigma_data=0.5, block_out_channels=(16, 16), norm_num_groups=4, sample_size=4
)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def random_classifier(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    classifier = NoisyClassifier(config).eval().requires_grad_(False)
    for parameter in (classifier.linear_out.weight, classifier.prior):
        parameter.normal_()
    return classifier


# --- The network ------------------------------------------------------------------------------------------------------


def test_a_new_one_gives_every_class_its_share():
    logits = NoisyClassifier(CONFIG)(draw(2, 1, 4, 4), 0.7)
    assert logits.tolist() == [[0, 0, 0]] * 2


def test_one_level_for_all_and_one_for_each_agree():
    classifier, x = random_classifier(), 3 * draw(3, 1, 6, 5)
    one = classifier(x, 2.5)
    for sigma in (torch.tensor(2.5), torch.full((3,), 2.5), torch.full((3,), 2.5).double()):
        torch.testing.assert_close(classifier(x, sigma), one)
    mixed = classifier(x, torch.tensor([2.5, 0.1, 2.5]))
    torch.testing.assert_close(mixed[::2], one[::2])
    assert not torch.allclose(mixed[1], one[1], atol=1e-2)
    torch.testing.assert_close(classifier(x[1:2], 2.5), one[1:2])  # the same alone and in a batch
    assert classifier(x.double(), 2.5).dtype == torch.float64
    assert classifier.bfloat16()(x, 2.5).dtype == torch.float32
    labels = torch.tensor([2, 0, 1])
    log_prob = classifier.log_prob(x, 2.5, labels)
    torch.testing.assert_close(log_prob, classifier(x, 2.5).log_softmax(1)[range(3), labels])


def test_what_guidance_adds_is_bounded_at_any_noise():
    """sigma² times the gradient, the shift of D: of any weights it stays in the units of x_0, as that of the truth."""
    classifier, shifts = random_classifier(), []
    for sigma in (10.0, 160.0, 4096.0, 20_000.0):
        x = sigma * draw(8, 1, 4, 4)
        guided = classifier_guided(lambda x, sigma: x, partial(classifier.log_prob, labels=torch.arange(8) % 3))
        shifts.append(float((guided(x, sigma) - x).double().norm()))
    assert 0 < max(shifts) < 2 * min(shifts)


def test_gradients_are_had_in_inference_mode_and_leave_the_weights_alone():
    classifier, x = random_classifier(), draw(2, 1, 4, 4)
    with torch.inference_mode():
        labels = torch.tensor([0, 2])
        guided = classifier_guided(lambda x, sigma: 0 * x, partial(classifier.log_prob, labels=labels), 2.0)(x, 0.7)
    place = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier.log_prob(place, 0.7, labels.clone()).sum(), place)
    torch.testing.assert_close(guided, 2 * 0.7**2 * gradient)
    assert all(p.grad is None for p in classifier.parameters())


def test_configs_make_the_round_trip_and_errors_say_what_is_wrong():
    written = json.loads(json.dumps(CONFIG.to_dict()))
    assert NoisyClassifierConfig.from_dict(written) == CONFIG
    with pytest.raises(ValueError, match="NoisyClassifier has no config key 'heads'"):
        NoisyClassifierConfig.from_dict({"heads": 2})
    with pytest.raises(ValueError, match="of a UNet2DConditionModel; expected one of a NoisyClassifier"):
        NoisyClassifierConfig.from_dict({"_class_name": "UNet2DConditionModel"})
    with pytest.raises(ValueError, match="should differ"):
        NoisyClassifierConfig(labels=("a", "a"))
    with pytest.raises(ValueError, match="multiples of norm_num_groups"):
        NoisyClassifierConfig(block_out_channels=(12, 16))
    with pytest.raises(ValueError, match=r"at least two classes, got labels=\('a',\)"):
        NoisyClassifier(NoisyClassifierConfig(labels=("a",)))


# --- Trained, on classes whose posterior is known ---------------------------------------------------------------------

MEANS, STD = torch.tensor([-0.5, 0.5, 0.0]), 0.3  # every pixel of class k is N(MEANS[k], STD²); the classes as likely


def exact_logits(x, sigma):
    return -(x[:, None] - MEANS.view(1, 3, 1, 1, 1)).square().sum((2, 3, 4)) / (2 * (STD**2 + sigma**2))


def exact_denoiser(x, sigma, k):
    mean = MEANS[k].view(-1, 1, 1, 1)
    return mean + STD**2 / (STD**2 + sigma**2) * (x - mean)


def test_trained_it_is_the_exact_posterior_and_guides_to_the_class():
    torch.manual_seed(0)
    classifier, generator = NoisyClassifier(CONFIG), torch.Generator().manual_seed(1)
    begin_at_zero(classifier)
    levels = training_noise("log_normal", classifier.schedule, mean=0.0, std=1.2)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=4e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)

    def batch(number):
        labels = torch.randint(3, (number,), generator=generator)
        x0 = MEANS[labels].view(-1, 1, 1, 1) + STD * torch.randn(number, 1, 4, 4, generator=generator)
        return x0, labels, torch.randn(x0.shape, generator=generator)

    for _ in range(250):
        x0, labels, noise = batch(128)
        sigma = levels.sigma(torch.rand(128, generator=generator))
        optimizer.zero_grad()
        classification_loss(classifier, x0, labels, sigma, noise).mean().backward()
        optimizer.step()
        rate.step()
    classifier.eval().requires_grad_(False)
    for sigma in (0.5, 1.0, 3.0):
        x0, labels, noise = batch(512)
        x = x0 + sigma * noise
        exact = exact_logits(x, sigma).log_softmax(1)
        excess = (exact.exp() * (exact - classifier(x, sigma).log_softmax(1))).sum(1).mean()  # a divergence, in nats
        assert 0 <= float(excess) < 0.02
        share = exact.exp()
        told_nothing = sum(
            share[:, k].view(-1, 1, 1, 1) * exact_denoiser(x, sigma, torch.tensor([k])) for k in range(3)
        )
        guided = classifier_guided(lambda *_, d=told_nothing: d, partial(classifier.log_prob, labels=labels))(x, sigma)
        told = exact_denoiser(x, sigma, labels)
        left = float((guided - told).square().mean() / (told_nothing - told).square().mean())
        assert left < 0.3, sigma  # of the square of what the class says about x_0
    x0, labels, noise = batch(64)
    sigma = torch.full((64,), 0.7)
    loss = classification_loss(classifier, x0, labels, sigma, noise)
    torch.testing.assert_close(loss, -classifier.log_prob(x0 + 0.7 * noise, sigma, labels))


# --- In a pipeline ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unconditional() -> TextToImagePipeline:
    """A latent model of random weights that is told nothing."""
    model = tiny_model()
    torch.manual_seed(2)
    unet = UNet(without_text(model.unet.config)).eval().requires_grad_(False)
    scheduler = scheduler_config("scaled_linear", "v")
    pipe = TextToImagePipeline(Model(unet, model.vae, Unconditional(), scheduler, Defaults(steps=4, sampler="ddim")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("classifier")
    config = NoisyClassifierConfig(
        labels=NAMES, in_channels=4, block_out_channels=(16, 16), norm_num_groups=4, sample_size=4
    )
    save_network(random_classifier(config), place)
    return place


def test_a_folder_opens_with_the_same_weights(folder: Path):
    with torch.inference_mode():
        classifier = load_classifier(folder)
    x, labels = draw(2, 4, 4, 4).requires_grad_(), torch.tensor([0, 1])
    wanted = random_classifier(classifier.config)
    assert all(torch.equal(a, b) for a, b in zip(classifier.parameters(), wanted.parameters(), strict=True))
    classifier.log_prob(x, 1.0, labels).sum().backward()  # opened in inference mode, it has gradients all the same
    assert bool(x.grad.any())
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_classifier(folder / "nowhere")


def test_prompts_name_the_classes(unconditional: TextToImagePipeline, folder: Path):
    call = {"seed": 3, "output_type": "latent"}
    plain = unconditional(["", ""], **call).images
    at_zero = unconditional(["up", "down"], classifier=folder, classifier_scale=0.0, **call).images
    assert torch.equal(at_zero, plain)
    classifier = load_classifier(folder)
    guided = unconditional(["up", "down"], classifier=classifier, classifier_scale=3.0, **call).images
    assert not torch.allclose(guided, plain, atol=1e-2)
    for name, picture, without in (("up", guided[0], plain[0]), ("down", guided[1], plain[1])):
        label = torch.tensor([NAMES.index(name)])
        before, after = (float(classifier.log_prob(z[None], 0.1, label)) for z in (without, picture))
        assert after > before
    alone = unconditional("down", classifier=folder, classifier_scale=3.0, **(call | {"seed": 4})).images
    torch.testing.assert_close(alone[0], guided[1], rtol=1e-4, atol=1e-4)
    twice = unconditional(["up"], classifier=folder, classifier_scale=3.0, num_images_per_prompt=2, **call).images
    torch.testing.assert_close(twice[0], guided[0], rtol=1e-4, atol=1e-4)


def test_it_is_the_guided_denoiser_sampled(unconditional: TextToImagePipeline, folder: Path):
    seen: list = []
    unconditional(
        "flat", classifier=folder, classifier_scale=2.0, seed=1, callback=lambda *step: seen.append(step), steps=3
    )
    classifier, denoiser = load_classifier(folder), unconditional.model.denoiser
    assert len(seen) == 3
    for _, sigma, x, x0 in seen:
        place = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(classifier(place, sigma).log_softmax(1)[0, 2], place)
        torch.testing.assert_close(x0, denoiser(x.clone(), sigma) + 2.0 * sigma**2 * gradient, rtol=1e-4, atol=1e-4)
        assert math.isfinite(float(x0.abs().max()))


@pytest.mark.parametrize("path", ["linear", "edm", "flow"])
def test_a_model_told_of_classes_is_guided_on_top(path: str):
    """Pixels, and classes that the U-Net knows too: the classifier's gradient comes to the classifier-free estimate."""
    torch.manual_seed(4)
    unet = PixelUNet(
        PixelUNetConfig(
            in_channels=1,
            out_channels=1,
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=(1, 1),
            attention_heads=(0, 0),
            num_class_embeds=len(NAMES) + 1,
        )
    )
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    unet.eval().requires_grad_(False)
    scheduler = scheduler_config(path, {"linear": "v", "edm": "edm", "flow": "velocity"}[path])
    defaults = Defaults(steps=3, guidance_scale=1.5, caption_dropout=0.2, sampler="euler", size=8)
    pipe = TextToImagePipeline(Model(unet, Identity(1), Labels(NAMES), scheduler, defaults))
    pipe.set_progress_bar_config(disable=True)
    classifier, seen = random_classifier(), []
    call = {"classifier": classifier, "classifier_scale": 3.0, "seed": 2}
    picture = pipe(["up", "flat"], **call, callback=lambda *step: seen.append(step)).images[1]
    assert picture.size == (8, 8)
    wished = torch.tensor([NAMES.index("up"), NAMES.index("flat")])
    told, untold = {"class_labels": wished}, {"class_labels": torch.tensor([len(NAMES)] * 2)}
    free = classifier_free(pipe.model.denoiser, told, untold, 1.5)
    shifts = []
    for _, sigma, x, x0 in seen:
        place = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(classifier.log_prob(place, sigma, wished).sum(), place)
        shift = 3.0 * sigma**2 * gradient
        torch.testing.assert_close(x0, free(x.clone(), sigma) + shift, rtol=1e-4, atol=1e-4 * float(1 + x.abs().max()))
        shifts.append(float(shift.abs().max()))
    assert max(shifts) > 0.1
    again = pipe(["up", "flat"], **call, output_type="pt", image=[picture, picture], strength=0.5).images
    assert again.shape == (2, 3, 8, 8)


def test_a_picture_says_how_it_was_guided(unconditional: TextToImagePipeline, folder: Path):
    picture = unconditional("up", classifier=folder, classifier_scale=2.0, seed=1, steps=2).images[0]
    said = picture.settings
    assert (said["prompt"], said["classifier"], said["classifier_scale"]) == ("up", str(folder), 2.0)
    assert "classifier_scale" not in unconditional("", seed=1, steps=2).images[0].settings
    with pytest.raises(ValueError, match="belongs to a classifier"):
        unconditional("up", classifier_scale=2.0, seed=1, steps=2)


def test_bad_calls_say_what_was_got(unconditional: TextToImagePipeline, folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="label 'ip' is none of the 3 classes; did you mean down, up"):
        unconditional("ip", classifier=folder)
    with pytest.raises(ValueError, match="name of a class in each prompt: down, up, flat"):
        unconditional(["up", ""], classifier=folder)
    save_network(random_classifier(), tmp_path)
    with pytest.raises(ValueError, match="latents of 1 channels, the model's have 4"):
        unconditional("up", classifier=tmp_path)
