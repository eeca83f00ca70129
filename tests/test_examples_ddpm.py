"""The examples on ancestral sampling and classifier guidance run, small, and what their figures show is so."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from conditioning.context import Unconditional
from examples import ancestral, classifier_guidance, learned_variance
from ldm.classifier import NoisyClassifier, NoisyClassifierConfig, classification_loss
from ldm.pixel_unet import PixelUNet, PixelUNetConfig
from pipelines.defaults import Defaults
from pipelines.files import save_network
from pipelines.folder import Model, save_model, scheduler_config
from vae.autoencoder import Identity


def wide(file: Path) -> bool:
    with Image.open(file) as figure:
        return figure.width > 1000


def test_which_variance_is_exact_on_which_data(tmp_path: Path) -> None:
    distances = ancestral.main(tmp_path, small=True)
    assert wide(tmp_path / "ancestral.png")
    for data, exact, other in (("one point", "small", "large"), ("N(0, 1)", "large", "small")):
        found = distances[data]
        (chance,) = found["chance"]
        assert max(found[exact]) < 3 * chance
        assert found["optimal"] == pytest.approx(found[exact], rel=1e-6)
        assert found[other][0] > 10 * chance
        assert all(after < before / 2 for before, after in pairwise(found[other]))
    mixture = distances["mixture"]
    for name in ("small", "large"):
        assert all(after < before for before, after in pairwise(mixture[name]))
        assert mixture["optimal"][1] < mixture[name][1] / 2  # of 16 steps


def test_a_learned_variance_beats_both_fixed_ones(tmp_path: Path) -> None:
    found = learned_variance.main(tmp_path, small=True)
    assert wide(tmp_path / "learned_variance.png")
    (exact,) = found["exact"]
    few, more = zip(found["small"], found["large"], found["learned"], strict=True)  # 10 steps, 40
    assert exact < more[2] < more[1] - 0.05 < more[0] / 10
    assert few[2] < few[0] / 100
    best, v = found["v"]["best"], found["v"]["learned"]
    assert min(best) < 0.2  # among the clusters, nearly the small one
    assert best[-1] > 0.9  # where there is more noise than data, the large one
    assert v[-1] > 0.9
    assert min(v) < v[-1] - 0.1


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A pixel model of N(0, I), and a classifier that tells dark from bright; the judge is the same."""
    torch.manual_seed(0)
    config = PixelUNetConfig(
        in_channels=1,
        out_channels=1,
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=(1, 1),
        attention_heads=(0, 0),
    )
    model = Model(PixelUNet(config), Identity(1), Unconditional(), scheduler_config("linear", "v"), Defaults(size=8))
    save_model(model, tmp_path / "model")
    names = ("dark digit", "bright digit")
    classifier = NoisyClassifier(NoisyClassifierConfig(labels=names, block_out_channels=(8, 8), sample_size=8))
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.02)
    labels = torch.arange(64) % 2
    for _ in range(40):
        x0 = (labels - 0.5).view(-1, 1, 1, 1) + 0.5 * torch.randn(64, 1, 8, 8)
        loss = classification_loss(classifier, x0, labels, torch.randn(64).exp(), torch.randn(64, 1, 8, 8))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    for name in ("classifier", "judge"):
        save_network(classifier, tmp_path / name)
    return {name: tmp_path / name for name in ("model", "classifier", "judge")}


def test_classifier_guidance_at_scale_1_is_the_class_and_beyond_it_surer(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    found = classifier_guidance.main(tmp_path, small=True, **folders)
    assert wide(tmp_path / "classifier_guidance.png")
    points, data = found["points"], found["data"][1.0]
    assert points[0.0]["right class"] == pytest.approx(1 / 3, abs=0.05)
    assert points[1.0]["right class"] == pytest.approx(data["right class"], abs=0.03)
    assert points[1.0]["distance"] < 2 * data["distance"] < points[0.0]["distance"] / 4
    assert points[8.0]["right class"] > 0.99
    assert points[8.0]["spread"] < 0.6
    assert points[8.0]["distance"] > points[0.0]["distance"]
    assert found["digits"][8.0]["right class"] == 1 > found["digits"][0.0]["right class"]


def test_two_folders_of_three_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--model, --classifier and --judge"):
        classifier_guidance.main(tmp_path, small=True, model=folders["model"], judge=folders["judge"])
