"""The network that judges: what it learns, that nothing of how it was run shows, and what is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train.answers
import train.pictograms
import train.recogniser
from pipelines.files import checkpoints
from tests.test_drawn import needs_font
from tests.training import poison
from train.answers import GRAIN, augmented, drawings, numbered, softened
from train.data import to_unit
from train.recogniser import PRESETS, Config, main
from train.recogniser_model import Recogniser, RecogniserConfig, load_recogniser

pytestmark = pytest.mark.usefixtures("in_process")

ROOT = Path(__file__).resolve().parents[1]
TASKS = (("class", ("left", "right")),)
TINY = RecogniserConfig(sample_size=9, widths=(8, 8))


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noisy pictures: the brighter half is to the left, or to the right."""
    folder, rng = tmp_path_factory.mktemp("halves"), np.random.default_rng(0)
    for name in ("left", "right"):
        (folder / name).mkdir()
        for i in range(40):
            pixels = rng.normal(100, 20, (9, 9, 3))
            pixels[:, slice(0, 4) if name == "left" else slice(5, 9)] += 60
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def config(halves: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(
        data=str(halves),
        output=tmp_path_factory.mktemp("unused"),
        cache=tmp_path_factory.mktemp("cache"),
        model=TINY,
        flip=False,
        shift=1,
        epochs=12,
        batch_size=16,
        warmup=3,
        mixed_precision="no",
        workers=0,
    )


def test_it_learns_and_says_how_often_it_is_right(config: Config, halves: Path, tmp_path: Path) -> None:
    run = main(replace(config, output=tmp_path / "run", test=str(halves)))
    said = json.loads((checkpoints(run)[-1] / "accuracy.json").read_text())
    assert said == {"class": pytest.approx(said["class"]), "pictures": 80}
    assert said["class"] > 0.95
    network = load_recogniser(run)
    assert network.config.tasks == TASKS
    assert not network.training
    images = [np.asarray(Image.open(halves / name / "0.png")) for name in ("right", "left")]
    found = network(to_unit(torch.from_numpy(np.stack(images))))[0].argmax(1)
    assert found.tolist() == [1, 0]


def test_gradients_that_are_no_numbers_reach_no_checkpoint(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 4, lambda accelerator: accelerator._models[-1].linear_out.weight)
    with pytest.raises(ValueError, match=r"gradient is nan at update 3: the checkpoints in .* are untouched"):
        main(replace(config, output=tmp_path, epochs=2, checkpoint_every=3))
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-0000003"]
    assert all(weight.isfinite().all() for weight in load_recogniser(tmp_path).state_dict().values())


def test_another_set_of_the_same_name_is_refused(config: Config, halves: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(halves, tmp_path / "mine")
    main(replace(config, data=str(mine), output=tmp_path / "run", epochs=1))
    (mine / "left" / "39.png").unlink()
    with pytest.raises(ValueError, match="--data is not what this run was trained on"):
        main(replace(config, data=str(mine), output=tmp_path / "run", epochs=1))


def test_a_killed_run_ends_with_the_same_bytes(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(config, epochs=2, checkpoint_every=3)
    whole = main(replace(short, output=tmp_path / "whole"))

    class Killed(Exception):
        pass

    rate = train.recogniser.learning_rate

    def killing(update: int, **kwargs) -> float:
        if update == 7:
            raise Killed
        return rate(update, **kwargs)

    monkeypatch.setattr(train.recogniser, "learning_rate", killing)
    with pytest.raises(Killed):
        main(replace(short, output=tmp_path / "killed"))
    monkeypatch.undo()
    again = main(replace(short, output=tmp_path / "killed"))
    one, other = ((checkpoints(r)[-1] / "diffusion_pytorch_model.safetensors").read_bytes() for r in (whole, again))
    assert one == other
    with pytest.raises(ValueError, match=r"learning_rate: 0\.01 before, 0\.1 now"):
        main(replace(short, output=tmp_path / "killed", learning_rate=0.1))
    state = checkpoints(again)[-1] / "training" / "state.pt"
    torch.save(torch.load(state, weights_only=True) | {"global_batch": 2 * short.batch_size}, state)  # of two processes
    with pytest.raises(ValueError, match=f"whose updates see {2 * short.batch_size} pictures"):
        main(replace(short, output=tmp_path / "killed"))


def test_the_first_layer_whitens() -> None:
    """Patches come out of its first half uncorrelated, of variance 1 where they have much more than the floor."""
    images = torch.randn(400, 3, 9, 9, generator=torch.Generator().manual_seed(0)).cumsum(3) / 3
    network = Recogniser(replace(TINY, tasks=TASKS))
    network.whiten(images)
    out = network.conv_in(images).detach().transpose(0, 1).flatten(1).double()
    assert torch.allclose(out[:12], -out[12:], atol=1e-5)
    second = out[:12] @ out[:12].T / out.shape[1]
    assert torch.allclose(second, torch.eye(12, dtype=torch.float64), atol=0.03)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert "conv_in.weight" not in trained
    assert "blocks.0.conv1.weight" in trained


def test_augmented_pictures_are_moved_and_mirrored() -> None:
    images = torch.arange(200 * 25, dtype=torch.float32).view(200, 1, 5, 5)
    draw = torch.Generator().manual_seed(0)
    shown = augmented(images, 1, True, draw)
    assert shown.shape == images.shape
    inner = images[:, :, 1:4, 1:4]
    shifts = [(y, x) for y in range(3) for x in range(3)]
    kinds = set()
    for one, other in zip(shown, inner, strict=True):
        seen = {
            (y, x, side)
            for y, x in shifts
            for side in (False, True)
            if torch.equal((one.flip(2) if side else one)[:, y : y + 3, x : x + 3], other)
        }
        assert len(seen) == 1
        kinds |= seen
    assert len(kinds) == 18
    assert torch.equal(augmented(images, 0, False, draw), images)


def test_softened_pictures_are_blurred_and_grainy() -> None:
    draw = torch.Generator().manual_seed(0)
    board = torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0).expand(200, 3, 16, 16)
    spread = softened(board, 0.5, draw).diff(dim=3).abs().mean((1, 2, 3))
    untouched = spread == 2
    assert 70 < int(untouched.sum()) < 130
    assert float(spread[~untouched].max()) < 1.5
    grey = softened(torch.zeros(200, 3, 16, 16), 1.0, draw)
    assert float(grey.mean().abs()) < 0.01
    assert 0 < float(grey.std((1, 2, 3)).min()) < 0.02
    assert float(grey.std((1, 2, 3)).max()) == pytest.approx(GRAIN, rel=0.1)
    assert torch.equal(softened(board, 0.0, draw), board)


@needs_font
def test_drawings_are_of_all_pairs_and_others_than_a_generator_sees() -> None:
    from train.pictograms import Pictograms

    source, rows = drawings("pictograms", 16, 1, None, seed=1)
    assert len(source) == len(rows) == len(Pictograms(16, split="all"))
    trained_on = Pictograms(16, split="train")
    place = rows.index(trained_on.rows[5])
    assert source[place].captions == trained_on[5].captions
    assert source[place].image.tobytes() != trained_on[5].image.tobytes()
    assert source.fingerprint() != drawings("pictograms", 16, 1, None, seed=2)[0].fingerprint()


@needs_font
def test_it_learns_objects_and_styles(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("fox", "whale")
    monkeypatch.setattr(
        train.answers, "Pictograms", lambda size, objects, *rest: train.pictograms.Pictograms(size, few, *rest)
    )
    small = RecogniserConfig(sample_size=24, widths=(16, 16, 32))
    run = main(replace(config, data="pictograms", model=small, output=tmp_path / "run", epochs=6, views=2))
    network = load_recogniser(run)
    assert [task for task, _ in network.config.tasks] == ["object", "style"]
    assert [len(answers) for _, answers in network.config.tasks] == [2, 6]
    said = json.loads((checkpoints(run)[-1] / "accuracy.json").read_text())
    drawn = (drawings("pictograms", 24, views, None, seed)[0] for views, seed in ((2, 1), (1, 2)))
    seen, others = ([source[i].image.tobytes() for i in range(len(source))] for source in drawn)
    unseen = set(others) - set(seen)  # of pixel art some drawings of another seed are the same
    assert said["pictures"] == len(unseen) < len(others) == 2 * 6 * 8
    assert said["object"] > 0.7
    assert said["style"] > 0.5


def test_bad_settings_say_what_was_got(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--batch-size is 0"):
        replace(config, batch_size=0)
    with pytest.raises(ValueError, match="--shift is 5: expected 0 to less than half"):
        replace(config, shift=5)
    with pytest.raises(ValueError, match="in_channels=2"):
        RecogniserConfig(in_channels=2)
    with pytest.raises(ValueError, match="more than 8 pixels"):
        RecogniserConfig(sample_size=8, widths=(4, 4, 4))
    with pytest.raises(ValueError, match="names of two answers or more"):
        Recogniser(replace(TINY, tasks=(("class", ("alone",)),)))
    with pytest.raises(ValueError, match="class 'up' is none of the 2"):
        numbered({"class": ["left", "up"]}, TASKS)
    assert all(isinstance(preset, Config) for preset in PRESETS.values())


def test_the_script_runs_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train" / "recogniser.py"), "--data", "nowhere"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: --data 'nowhere' does not exist")
