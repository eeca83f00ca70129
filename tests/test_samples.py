"""What is painted for a measurement, and what is said of it: which noise, from which model, and what is kept."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

import atelier
import train.measure
from pipelines import TextToImagePipeline
from pipelines.files import save_network
from pipelines.scheduler import sampler_of
from tests.lora import factors
from tests.test_bits import silent_model
from train.measure import Measuring, measure
from train.recogniser_model import Recogniser, RecogniserConfig
from train.samples import NOISES, NOTES, Painting, common_side, notes_of, open_painter, paint_samples, read_samples
from vae.autoencoder import Identity

pytestmark = pytest.mark.usefixtures("in_process")
HOW = Painting(steps=2, batch=4)
COLOURS = ("red", "green", "blue", "white", "black")


def coloured(folder: Path, *, captions: bool = True) -> Path:
    folder.mkdir()
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
        if captions:
            (folder / f"{i}.txt").write_text(f"a {colour} circle")
    return folder


@pytest.fixture
def measuring(model_folder: Path, tmp_path: Path) -> Measuring:
    torch.manual_seed(0)
    network = Recogniser(RecogniserConfig(tasks=(("class", ("a", "b")),), sample_size=9, widths=(8, 6)))
    network(torch.randn(64, 3, 9, 9))
    save_network(network, tmp_path / "extractor")
    where = {"reference": str(coloured(tmp_path / "reference")), "extractor": str(tmp_path / "extractor")}
    few: dict[str, Any] = {"samples": 4, "painting": HOW, "workers": 0, "cache": tmp_path / "cache"}
    return Measuring(str(model_folder), **where, **few, metrics="fid", out=tmp_path / "out")


def seeds(folder: Path) -> set[str]:
    found = set()
    for file in folder.glob("*.png"):
        with Image.open(file) as image:
            found.add(image.text["seed"])  # type: ignore[attr-defined]
    return found


def test_seeds_share_no_noise(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    for seed in (0, 1):
        paint_samples(pipe, ["a fox"] * 5, tmp_path / str(seed), replace(HOW, seed=seed), Accelerator())
    assert seeds(tmp_path / "0") == {str(i) for i in range(5)}
    assert seeds(tmp_path / "1") == {str(NOISES + i) for i in range(5)}
    with pytest.raises(ValueError, match="expected at most 1,000,000"):
        paint_samples(pipe, [""] * (NOISES + 1), tmp_path / "many", HOW, Accelerator())
    with pytest.raises(ValueError, match="--seed 99999999999999: expected less"):
        Painting(seed=99999999999999)


def test_what_was_painted_with_is_noted(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    """As it was, and not as it was asked for: below 1 there is no guidance, and the sampler is the scheduler's."""
    pipe.model.defaults = replace(pipe.model.defaults, sampler="")
    paint_samples(pipe, ["a fox"], tmp_path / "told", replace(HOW, guidance=0.5, sampler=None), Accelerator())
    notes = json.loads((tmp_path / "told" / NOTES).read_text())
    assert (notes["guidance"], notes["sampler"]) == (1.0, sampler_of(pipe.model.scheduler))
    earlier = {key: value for key, value in notes.items() if key != "views"} | {"guidance": 0.5, "sampler": ""}
    (tmp_path / "told" / NOTES).write_text(json.dumps(earlier))  # as it was noted once: the same painting
    paint_samples(pipe, ["a fox"], tmp_path / "told", replace(HOW, guidance=0.5, sampler=None), Accelerator())
    assert notes_of(tmp_path / "told") == notes
    silent = TextToImagePipeline.from_pretrained(silent_model(tmp_path / "model", Identity(3)), device="cpu")
    paint_samples(silent, [""], tmp_path / "silent", replace(HOW, guidance=3.0), Accelerator())
    assert json.loads((tmp_path / "silent" / NOTES).read_text())["guidance"] == 1.0
    with pytest.raises(ValueError, match=r"painted otherwise \(for other prompts\): give another --out"):
        paint_samples(silent, ["a fox"], tmp_path / "silent", replace(HOW, guidance=3.0), Accelerator(), reference="x")


def test_guidance_may_be_for_some_noise_levels(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    levels = {"all": None, "none": (1e6, 1e7), "first": (5.0, 1e9)}  # of two steps: both, none, the first
    for name, interval in levels.items():
        how = replace(HOW, guidance=5.0, guidance_interval=interval)
        paint_samples(pipe, ["a fox"], tmp_path / name, how, Accelerator())
        assert notes_of(tmp_path / name)["guidance_interval"] == (list(interval) if interval else None)
    paint_samples(pipe, ["a fox"], tmp_path / "unguided", replace(HOW, guidance=1.0), Accelerator())
    pictures = {}
    for name in (*levels, "unguided"):
        with Image.open(tmp_path / name / "000000.png") as image:
            pictures[name] = image.tobytes()
    assert pictures["none"] == pictures["unguided"]
    assert len({pictures[name] for name in ("all", "first", "unguided")}) == 3


def test_bits_are_kept_while_pictures_are_painted(measuring: Measuring, tmp_path: Path, monkeypatch) -> None:
    model = str(silent_model(tmp_path / "model", Identity(3)))
    how = replace(measuring, model=model, metrics="fid,bpd", size=None)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.measure, "paint_samples", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(how)
    monkeypatch.undo()
    monkeypatch.setattr(train.measure, "measure_bits", killed)  # which is not asked again
    assert [one["metric"] for one in measure(how)["metrics"]] == ["frechet", "bpd"]


def test_another_guidance_interval_is_another_painting(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    def paint(interval: tuple[float, float] | None) -> None:
        pipe.model.defaults = replace(pipe.model.defaults, guidance_interval=interval)
        paint_samples(pipe, ["a fox"], tmp_path / "samples", HOW, Accelerator())

    paint((0.3, 5.0))
    paint((0.3, 5.0))
    with pytest.raises(ValueError, match=r"painted otherwise \(guidance_interval: \[0\.3, 5\.0\] before, None now\)"):
        paint(None)


def test_fewer_samples_leave_the_captions_of_the_others(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    prompts = [f"a fox {i}" for i in range(3)]
    for some in (prompts, prompts[:1]):
        paint_samples(pipe, some, tmp_path, HOW, Accelerator())
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == prompts
    assert read_samples(str(tmp_path), None).captions == [(prompt,) for prompt in prompts]


def test_captions_with_line_separators_are_kept_as_they_are(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    prompts = ["a fox\u2028in a hat", "a fox\x85"]
    for _ in range(2):
        paint_samples(pipe, prompts, tmp_path, HOW, Accelerator())
    rows = (tmp_path / "metadata.jsonl").read_text("utf-8").rstrip("\n").split("\n")
    assert [json.loads(row)["text"] for row in rows] == prompts


def test_some_samples_of_a_folder_are_of_all_its_parts(tmp_path: Path) -> None:
    for name in COLOURS:
        coloured(tmp_path / name, captions=False)
    said: list[str] = []
    source = read_samples(str(tmp_path), 15, said.append)
    assert "15 of the 25 pictures" in said[-1]
    assert {file.parent.name for file in source.files} == set(COLOURS)
    assert source.files == sorted(source.files)
    assert source.files == read_samples(str(tmp_path), 15).files
    (tmp_path / "red" / "0.png").write_bytes(b"broken")
    assert common_side(read_samples(str(tmp_path), None)) == 16


def test_what_failed_before_the_first_picture_is_forgotten(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sampler"):
        paint_samples(pipe, ["a fox"], tmp_path / "samples", replace(HOW, sampler="eular"), Accelerator())
    assert len(paint_samples(pipe, ["a fox"], tmp_path / "samples", replace(HOW, sampler="euler"), Accelerator())) == 1


def test_a_model_with_a_lora(pipe: TextToImagePipeline, measuring: Measuring, tmp_path: Path) -> None:
    made = factors(pipe.model)
    file = tmp_path / "lora.safetensors"
    save_file({f"{part}.{key}": value for part, state in made.items() for key, value in state.items()}, file)
    with_it = replace(measuring, lora=(str(file),), lora_weight=(0.5,))
    found = measure(with_it)
    assert found["painted"]["loras"] == {str(file): 0.5}
    pipe.load_lora(file, 0.5)
    assert measure(replace(measuring, model="given", out=tmp_path / "other"), pipe)["metrics"] == found["metrics"]
    with pytest.raises(ValueError, match=r"loras: .* before, None now"):
        measure(measuring)
    with pytest.raises(ValueError, match="2 --lora-weight for 1 --lora"):
        open_painter(measuring.model, [str(file)], (1.0, 0.5))
    with pytest.raises(ValueError, match="bpd is of models without LoRAs"):
        measure(replace(with_it, metrics="fid,bpd", out=tmp_path / "bits"))
    with pytest.raises(ValueError, match=r"is loaded into a model, and .* is a folder of pictures"):
        measure(replace(with_it, model=measuring.reference))
    with pytest.raises(ValueError, match="--clip x is of the CLIP score: add clip to --metrics fid"):
        measure(replace(measuring, clip="x"))


def test_what_was_computed_is_kept(measuring: Measuring, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    whole = measure(replace(measuring, metrics="fid,kid,diversity"))

    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(train.measure, "diversity", broken)
    (measuring.out / "metrics.json").unlink()
    capsys.readouterr()
    with pytest.raises(RuntimeError, match="no memory"):
        measure(replace(measuring, metrics="fid,kid,diversity"))
    assert json.loads((measuring.out / "metrics.json").read_text())["metrics"] == whole["metrics"][:2]
    assert f"{whole['metrics'][1]['value']:.4f}" in capsys.readouterr().out


def test_nothing_is_painted_for_what_can_not_be_measured(measuring: Measuring, tmp_path: Path) -> None:
    for metrics, samples in (("precision", 3), ("kid", 3)):
        with pytest.raises(ValueError, match=rf"{metrics} of 3 samples and 5 pictures .*: expected 4 or more of each"):
            measure(replace(measuring, metrics=metrics, samples=samples))
    bare = coloured(tmp_path / "bare", captions=False)
    judged = replace(measuring, model=str(bare), samples=None, metrics="accuracy")
    with pytest.raises(ValueError, match=r"accuracy compares pictures with their captions, and those of .* have none"):
        measure(judged)
    assert not measuring.out.exists()


def test_another_reference_does_not_replace_the_numbers(measuring: Measuring, tmp_path: Path) -> None:
    first = replace(measuring, model=measuring.reference, samples=None)
    measure(first)
    measure(first)
    bare = replace(first, reference=str(coloured(tmp_path / "bare", captions=False)))
    before = (measuring.out / "metrics.json").read_text()
    with pytest.raises(ValueError, match=r"numbers against another reference, .*reference: give another --out"):
        measure(bare)
    assert (measuring.out / "metrics.json").read_text() == before
    assert measure(replace(bare, out=tmp_path / "bare-out"))["reference"]["pictures"] == 5  # no captions were needed


def test_pictures_without_captions_are_enough_for_a_model_that_is_told_nothing(
    measuring: Measuring, tmp_path: Path
) -> None:
    bare = str(coloured(tmp_path / "bare", captions=False))
    model = silent_model(tmp_path / "model", Identity(3))
    found = measure(replace(measuring, model=str(model), reference=bare, training=bare, metrics="fid,bpd"))
    assert [one["metric"] for one in found["metrics"]] == ["frechet", "bpd"]
    assert found["memorisation"]["held_out_that_are_in_training"] == 5
    with pytest.raises(ValueError, match="have no caption"):
        measure(replace(measuring, reference=bare, metrics="bpd"))  # bits given the caption


def test_captions_of_a_template_and_a_warning(measuring: Measuring, tmp_path: Path, capsys) -> None:
    how = replace(measuring, template="a photo of {text}", training=measuring.reference)
    measure(how)
    rows = [json.loads(line) for line in (how.out / "samples" / "metadata.jsonl").read_text().splitlines()]
    assert {row["text"] for row in rows} <= {f"a photo of a {colour} circle" for colour in COLOURS}
    said = capsys.readouterr().out
    assert "all of the reference are in the training set, so that nothing tells how near is too near" in said
    assert "5 of 5 pictures of the reference are in the training set, and count in no distance" in said


@pytest.mark.parametrize("stray", ["--judge j", "--prompts 100"])
def test_what_stands_not_beside_a_reference(stray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["atelier", "evaluate", "m", "--reference", "r", *stray.split()])
    with pytest.raises(SystemExit, match=rf"^error: {stray} is for an evaluation without --reference"):
        atelier.main()
