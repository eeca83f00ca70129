"""A classifier judges samples: right about real pictures, and about a model that paints classes, or nothing said."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train.classifier
import train.ldm
import train.recogniser
from ldm.classifier import NoisyClassifier, NoisyClassifierConfig
from ldm.pixel_unet import PixelUNetConfig
from pipelines.files import save_network
from train.extractors import open_extractor
from train.judge import answers_of, drawn_captions, evaluate_classes, open_judge, right_by_caption, verdicts
from train.presets import PRESETS
from train.recogniser_model import Recogniser, RecogniserConfig, load_recogniser

pytestmark = pytest.mark.usefixtures("in_process")

COLOURS = {"red": (220, 40, 40), "blue": (30, 60, 220)}


def patch(name: str, rng: np.random.Generator) -> Image.Image:
    """8×8 pixels of about one colour."""
    return Image.fromarray((np.array(COLOURS[name]) + rng.normal(0, 10, (8, 8, 3))).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("patches"), np.random.default_rng(0)
    for name in COLOURS:
        (folder / name).mkdir()
        for i in range(16):
            patch(name, rng).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def judge(patches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = NoisyClassifierConfig(block_out_channels=(8, 16))
    few = {"size": 8, "vae": "none", "updates": 60, "warmup": 5, "batch_size": 16, "workers": 0, "model": model}
    config = replace(train.classifier.PRESETS["clean"], data=str(patches), cache=patches.parent / "cache", **few)
    return train.classifier.main(replace(config, output=tmp_path_factory.mktemp("judge")))


@pytest.fixture(scope="module")
def recogniser(patches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = RecogniserConfig(sample_size=8, widths=(8, 8))
    few = {"epochs": 60, "warmup": 5, "batch_size": 16, "shift": 1, "workers": 0, "mixed_precision": "bf16"}
    config = train.recogniser.Config(data=str(patches), model=model, cache=patches.parent / "cache", **few)
    return train.recogniser.main(replace(config, output=tmp_path_factory.mktemp("recogniser")))


def painter(patches: Path, output: Path, told: str) -> Path:
    """A run that learnt to paint the patches, told which or not."""
    unet = PixelUNetConfig(block_out_channels=(16, 32), layers_per_block=(1, 1), attention_heads=(0, 0))
    few = {"size": 8, "vae": "none", "updates": 150, "warmup": 5, "batch_size": 16, "workers": 0, "steps": 10}
    config = replace(PRESETS["mnist"], data=str(patches), unet=unet, text_encoder=told, ema_decay=0.95, **few)
    return train.ldm.main(replace(config, output=output, cache=patches.parent / "cache", mixed_precision=None))


@pytest.mark.parametrize("kind", ["judge", "recogniser"])
def test_it_knows_real_pictures(kind: str, request: pytest.FixtureRequest) -> None:
    rng, classifier = np.random.default_rng(1), open_judge(request.getfixturevalue(kind))
    names = ["red", "blue", "blue", "red", "blue"] * 30
    found = verdicts(classifier, [patch(name, rng).resize((16, 16)) for name in names])
    assert [answers_of(classifier)["class"][i] for i in found.tolist()] == names


def test_it_sees_what_the_extractor_sees(recogniser: Path) -> None:
    judge, extractor = load_recogniser(recogniser), open_extractor(str(recogniser))
    grainy = np.random.default_rng(2).integers(0, 256, (60, 21, 21, 3), dtype=np.uint8)  # no colour more than the other
    seen = judge.answer(extractor(list(grainy)))[0].argmax(1)
    assert len(seen.unique()) == 2
    assert verdicts(judge, [Image.fromarray(one) for one in grainy]).equal(seen)


@pytest.fixture(scope="module")
def model(patches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return painter(patches, tmp_path_factory.mktemp("model") / "run", "labels")


def test_a_model_of_classes(judge: Path, model: Path, tmp_path: Path) -> None:
    result = evaluate_classes(str(model), judge, tmp_path / "out", prompts=21)
    assert result["pictures"] == 20  # as many of each
    assert result["right"] == 1
    assert result["by_class"] == {"blue": 1, "red": 1}
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result
    with Image.open(tmp_path / "out" / "samples.png") as sheet:
        colours = np.asarray(sheet)[4:68].reshape(64, -1, 3)[:, 4:-4]
    half = colours.shape[1] // 2
    assert colours[:, : half - 8, 2].mean() > colours[:, : half - 8, 0].mean()  # blue to the left, red to the right
    assert colours[:, half + 8 :, 0].mean() > colours[:, half + 8 :, 2].mean()


def test_a_recogniser_judges_classes(recogniser: Path, model: Path, tmp_path: Path) -> None:
    """Not so well as it judges what it was trained on, because these samples are grainy."""
    result = evaluate_classes(str(model), recogniser, tmp_path / "out", prompts=20)
    assert result["right"] == pytest.approx(np.mean(list(result["by_class"].values())))
    assert result["right"] >= 0.6


def test_what_captions_of_pictograms_say() -> None:
    known = drawn_captions()
    assert known["an oil painting of a fox on a blue background"] == {"object": "fox", "style": "oil"}
    assert known["a fox"] == {"object": "fox", "style": "plain"}
    tasks = (("object", ("cat", "fox")), ("style", ("oil", "plain")))
    judge = Recogniser(RecogniserConfig(tasks=tasks, widths=(4, 4)))
    said = ["a picture of a fox", "a cat", "an oil painting of a cat"]
    features = torch.eye(4)[:3]
    rows = [[0, 0, 9.0], [9, 9, 0], [0, 0, 9], [9, 9, 0]]  # cat, fox, oil, plain of each of the three
    judge.linear_out.weight.data[:, :3] = torch.tensor(rows)
    found = right_by_caption(judge, features, said)
    assert found == {"object": pytest.approx(2 / 3), "style": pytest.approx(1)}
    with pytest.raises(ValueError, match="'a dog on the moon' is no caption of pictograms"):
        right_by_caption(judge, features[:1], ["a dog on the moon"])
    with pytest.raises(ValueError, match="knows no object 'owl'"):
        right_by_caption(judge, features[:1], ["a picture of an owl"])


def test_a_model_that_is_told_nothing(judge: Path, patches: Path, tmp_path: Path) -> None:
    model = painter(patches, tmp_path / "run", "none")
    result = evaluate_classes(str(model), judge, tmp_path / "out", prompts=40)
    assert sum(result["share_of_class"].values()) == pytest.approx(1)
    assert min(result["share_of_class"].values()) > 0.2


def test_what_it_can_not_judge(judge: Path, tmp_path: Path) -> None:
    config = NoisyClassifierConfig(labels=("a", "b"), in_channels=4, block_out_channels=(8,))
    save_network(NoisyClassifier(config), tmp_path / "of_latents")
    with pytest.raises(ValueError, match="latents of 4 channels: expected one of pixels"):
        evaluate_classes("bundled", tmp_path / "of_latents", tmp_path)
    tasks = (("object", ("a", "b")), ("style", ("c", "d")))
    save_network(Recogniser(RecogniserConfig(tasks=tasks)), tmp_path / "of_pictograms")
    with pytest.raises(ValueError, match="tells object and style apart, which is for models of pictograms"):
        evaluate_classes("bundled", tmp_path / "of_pictograms", tmp_path)
    with pytest.raises(ValueError, match="expected one field, the class"):
        evaluate_classes("bundled", judge, tmp_path, template="a {bright} {class}")
    with pytest.raises(ValueError, match="--prompts 1: expected at least 2"):
        evaluate_classes("bundled", judge, tmp_path, prompts=1)
