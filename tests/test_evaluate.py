"""What is said of a model of pictograms: by a judge of objects and styles, beside the training set, within a prompt."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import atelier
import train.evaluate
import train.judge
from pipelines.defaults import Defaults
from pipelines.files import save_network
from tests.test_drawn import needs_font
from train.evaluate import beside_training, draw_rows, evaluate, judged, open_pictogram_judge, several
from train.extractors import open_extractor
from train.pictograms import STYLES, Pictograms, Row, captions, chosen, paint
from train.recogniser_model import Recogniser, RecogniserConfig
from train.reference import InMemory
from train.results import joined
from train.samples import Painting
from train.sources import Drawn
from vae.autoencoder import Autoencoder, AutoencoderConfig

pytestmark = [pytest.mark.usefixtures("in_process"), needs_font]

OBJECTS = ("apple", "fox", "whale")
TASKS = (("object", OBJECTS), ("style", ("oil", "plain")))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights; it has seen pictograms, so that its norms tell them apart."""
    torch.manual_seed(0)
    network = Recogniser(RecogniserConfig(tasks=TASKS, sample_size=17, widths=(8, 16)))
    pictures = torch.stack([torch.randn(3, 17, 17) for _ in range(64)])
    network(pictures)
    folder = tmp_path_factory.mktemp("judge")
    save_network(network, folder)
    return folder


@pytest.mark.parametrize("copies", [False, True])
def test_samples_beside_training(
    copies: bool, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fresh drawings are as far from those of training as real ones; copies are not, nor do they differ."""
    training = Pictograms(32, OBJECTS)
    rows = [training.rows[i] for i in range(0, len(training), 7)]
    drawn = {captions(*row[:3])[0]: row for row in rows}
    monkeypatch.setattr(train.evaluate, "open_source", lambda *_, **__: Drawn(training, "few", 32))
    alike = [paint(*drawn[p][:3], 32, 5 if copies else i) for i, p in enumerate(several(list(drawn)))]
    images = [
        training[training.rows.index(row)].image if copies else paint(*row[:3], 32, 77 + i)
        for i, row in enumerate(rows)
    ]
    vae: Any = Autoencoder(AutoencoderConfig(block_out_channels=(8,), norm_num_groups=4))
    vae.encode, vae.decode = lambda images: SimpleNamespace(mode=images), lambda latents: latents  # which loses nothing
    options = {"data": "pictograms", "views": 1, "font": None, "cache": tmp_path / "cache", "vae": vae}
    found = beside_training(images, rows, alike, judge, tmp_path / "out", **options)  # type: ignore[arg-type]
    near, spread, likeness = found["memorisation"], found["diversity"], found["likeness"]
    said = capsys.readouterr().out
    share = near["share_of_samples_nearer_than_1%_of_held_out"]
    assert f"nearer than the nearest 1% of fresh drawings are {share:.1%} of {len(rows)} samples" in said
    assert likeness["pictures"] == len(rows)
    assert "singular" not in said
    for kind in ("samples", "other_drawings"):  # both are drawings that the others were not made from
        frechet = likeness[kind]["frechet"]
        assert 0 < frechet < 2 * likeness["other_drawings"]["frechet"]
        assert likeness[kind]["precision"] > 0.7
        assert likeness[kind]["recall"] > 0.7
        assert f"{likeness['drawings_hash']}: frechet {frechet:.4g}, precision" in said
    if copies:
        assert near["ratio"] < 1e-4
        assert share > 0.9
        assert spread["of_a_prompt"] == pytest.approx(0, abs=1e-5)
    else:
        assert 0.5 < near["ratio"] < 2
        assert 0.5 < spread["of_a_prompt"] / spread["of_its_drawings"] < 2
    assert near["copies_to_training"] < 1e-4  # nor hides a copy
    assert near["share_of_copies_nearer_than_1%_of_held_out"] == 1
    counts = {"samples": len(rows), "held_out": len(rows), "training": len(training), "copies": len(rows)}
    assert near["pictures"] == counts
    assert f"{len(rows)} of fresh drawings {near['held_out_hash']}; extractor {near['extractor']}]" in said
    assert json.loads(json.dumps(found)) == found
    beside_training(images[:10], rows[:10], alike, judge, tmp_path / "few", **options)  # type: ignore[arg-type]
    assert "warning: 10 samples, and 16 features" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "neighbours.png") as sheet:
        assert sheet.width > 500


def test_shares_by_task(judge: Path) -> None:
    network = open_pictogram_judge(judge, OBJECTS)
    torch.nn.init.zeros_(network.linear_out.weight)  # the first answer of each is the likeliest
    rows = [Row("apple", "oil", "red", 0), Row("fox", "oil", "red", 0), Row("apple", "plain", "red", 0)]
    images = [paint(*row[:3], 32) for row in rows]
    assert judged(network, images, rows) == {"object": pytest.approx(2 / 3), "style": pytest.approx(2 / 3)}


class Altered:
    """An autoencoder that brings each value nearer to 0 by 0.02 of the 2 between black and white."""

    def encode(self, images: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(mode=images - 0.02 * images.sign())

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


@pytest.fixture
def drawing_model(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Instead of a model the data's own code paints, the first picture of each call wrongly; its objects."""
    objects = tuple(name for name in chosen() if draw_rows("held_out", 1, (name,), 0, None))[:4]
    rows = {captions(*row[:3])[0]: row for row in Pictograms(32, objects, "all").rows}
    defaults = Defaults(data=f"pictograms:{','.join(objects)}", size=32)
    model = SimpleNamespace(defaults=defaults, size=32, vae=Altered())
    pipe = SimpleNamespace(model=model, device=torch.device("cpu"), dtype=torch.float32)

    def paint_samples(pipe: object, prompts: list[str], folder: Path, how: Painting, *_: object, **__: str) -> InMemory:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "samples.json").write_text(json.dumps({"seed": how.seed}))
        (folder / "000000.png").touch()
        wrong = rows[prompts[0]]._replace(object=objects[objects.index(rows[prompts[0]].object) - 1])
        asked = [wrong, *(rows[prompt] for prompt in prompts[1:])]
        return InMemory([paint(*row[:3], 32, 900 + i) for i, row in enumerate(asked)], prompts)

    monkeypatch.setattr(train.evaluate, "open_painter", lambda *_: pipe)
    monkeypatch.setattr(train.evaluate, "paint_samples", paint_samples)
    monkeypatch.setattr(train.evaluate, "RECONSTRUCTED", 12)
    return objects


def test_the_figures_are_those_of_the_pictures(drawing_model: tuple[str, ...], tmp_path: Path) -> None:
    """Of drawings all are right but the one that shows another object."""
    found = evaluate("drawings", tmp_path, prompts=16, painting=Painting(seed=3))
    assert found["objects"] == len(drawing_model)
    for split, count in (("train", 16), ("held_out", 8)):
        assert found[split]["right"] == 1 - 1 / count
        low, high = found[split]["interval_95%"]
        assert low < 1 - 1 / count < high
        (miss,) = found[split]["misses"]
        asked, painted = miss.split(" -> ")
        assert asked.partition(" ")[2] != painted
        with Image.open(tmp_path / f"{split}.png") as sheet:
            assert sheet.height > 32
    assert found["held_out"]["pairs"] <= 8
    db = found["reconstruction_psnr_db"]
    assert db["all"] == pytest.approx(40, abs=0.01)  # 20 log 2 / 0.02
    assert db["standard_error"] == pytest.approx(0, abs=0.01)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    evaluate("drawings", tmp_path, prompts=16, painting=Painting(seed=4))
    assert json.loads((tmp_path / "evaluation.json").read_text())["earlier"] == [found]


def test_pictograms_may_come_several_times_in_an_epoch(
    drawing_model: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = train.evaluate.open_painter("drawings", (), ())
    pipe.model.defaults = replace(pipe.model.defaults, data=f"2*{pipe.model.defaults.data}+shapes")
    assert evaluate("drawings", tmp_path, prompts=4)["objects"] == len(drawing_model)


def test_a_judges_verdict_stands_beside_that_of_drawings(
    drawing_model: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tasks = (("object", drawing_model), ("style", tuple(STYLES)))
    network = Recogniser(RecogniserConfig(tasks=tasks, sample_size=17, widths=(4, 4)))
    torch.nn.init.zeros_(network.linear_out.weight)  # it always sees the first object and style
    save_network(network, tmp_path / "judge")
    monkeypatch.setattr(train.evaluate, "beside_training", lambda *_, **__: {"diversity": {}})
    alone = evaluate("drawings", tmp_path / "out", prompts=16)
    both = evaluate("drawings", tmp_path / "out", prompts=16, judge=tmp_path / "judge")
    assert both["judged_by"]["hash"] == open_extractor(str(tmp_path / "judge")).digest
    rows = draw_rows("train", 16, drawing_model, 0, None)
    shares = {"object": sum(row.object == drawing_model[0] for row in rows) / 16}
    shares["style"] = sum(row.style == next(iter(STYLES)) for row in rows) / 16
    assert both["train"]["judged"] == both["train"]["judged_drawings"] == pytest.approx(shares)
    assert both["train"]["right"] == alone["train"]["right"]
    written = joined(alone, both)  # the time is that of the first call, which painted
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == written
    assert written["train"]["seconds_per_picture"] == alone["train"]["seconds_per_picture"] > 0
    evaluate("drawings", tmp_path / "out", prompts=16)  # without the judge, whose numbers stay
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == written


def test_what_is_chosen_by_is_not_what_is_reported() -> None:
    halves = [draw_rows("held_out", 10_000, chosen(), 0, None, choosing=choosing) for choosing in (False, True)]
    pairs = [{row[:2] for row in half} for half in halves]
    assert not pairs[0] & pairs[1]
    assert len(halves[0]) + len(halves[1]) == len(Pictograms(64, chosen(), "held_out"))
    assert 0.3 < len(pairs[0]) / (len(pairs[0]) + len(pairs[1])) < 0.7
    assert draw_rows("train", 5, OBJECTS, 0, None, choosing=True) == draw_rows("train", 5, OBJECTS, 0, None)


def test_a_judge_of_something_else_is_refused(judge: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not know 1 of the model's 2 objects, such as 'owl'.*pictograms:all"):
        open_pictogram_judge(judge, ("fox", "owl"))
    save_network(Recogniser(RecogniserConfig(tasks=(("class", ("a", "b")),))), tmp_path)
    with pytest.raises(ValueError, match=r"tells class: expected one of train/recogniser.py --preset pictograms"):
        open_pictogram_judge(tmp_path, OBJECTS)


def test_pictures_in_memory_are_a_source() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    one = InMemory([red, blue], ["a", "b"])
    assert one[1] == (blue, ("b",), "picture 1")
    assert one.picture_size(0) == (8, 8)
    assert one.fingerprint() == InMemory([red.copy(), blue.copy()], ["a", "b"]).fingerprint()
    assert one.fingerprint() != InMemory([blue, red], ["a", "b"]).fingerprint()


def test_rows_of_a_split_are_drawn_by_the_seed() -> None:
    every = draw_rows("train", 10_000, OBJECTS, 0, None)
    some = draw_rows("train", 5, OBJECTS, 0, None)
    assert some == every[:5]
    assert len(set(every)) == len(every) == len(Pictograms(64, OBJECTS))
    assert draw_rows("train", 5, OBJECTS, 1, None) != some


def test_the_command_goes_by_what_the_judge_knows(judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    monkeypatch.setattr(train.evaluate, "evaluate", lambda *given, **more: seen.append((given, more)))
    monkeypatch.setattr(train.judge, "evaluate_classes", lambda *given, **more: seen.append((given, more)))
    classes = tmp_path / "classes"
    save_network(Recogniser(RecogniserConfig(tasks=(("class", ("a", "b")),))), classes)
    for words in ([], ["--judge", str(judge)], ["--judge", str(classes)]):
        monkeypatch.setattr(sys, "argv", ["atelier", "evaluate", "bundled", "--prompts", "7", "--steps", "6", *words])
        atelier.main()
    monkeypatch.setattr(sys, "argv", ["atelier", "evaluate", "bundled", "--judge", str(classes), "--cache", "there"])
    with pytest.raises(SystemExit, match="--cache is for models of pictograms: leave it out"):
        atelier.main()
    out, common = Path("evaluation"), {"prompts": 7, "painting": Painting(steps=6), "lora": (), "lora_weight": (1.0,)}
    of_pictograms = common | {"font": None, "cache": Path("cache")}
    assert seen == [
        (("bundled", out), of_pictograms | {"judge": None}),
        (("bundled", out), of_pictograms | {"judge": judge}),
        (("bundled", classes, out), common | {"template": ""}),
    ]
